//! The HTTP daemon of modelcache.
