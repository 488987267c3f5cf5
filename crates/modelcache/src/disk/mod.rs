//! The near tier: a local directory.
