//! Everything particular to S3: requests and their signatures, credentials, settings, and the quirks of listings.

pub(in crate::remote) mod copy;
pub(in crate::remote) mod credentials;
pub(in crate::remote) mod http_client;
pub(in crate::remote) mod policy;
pub(in crate::remote) mod profile;
pub(in crate::remote) mod raw_client;
pub(in crate::remote) mod settings;
pub(in crate::remote) mod xml;
