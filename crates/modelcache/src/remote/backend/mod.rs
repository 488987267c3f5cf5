//! Where a remote keeps its objects: an S3 bucket, or a local folder with the same layout.

pub(in crate::remote) mod failure;
pub(in crate::remote) mod s3;
