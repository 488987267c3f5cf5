//! Refuses connections to link-local addresses and to the metadata services of clouds, which hand out credentials of
//! the machine. A server that accepts references from others must not be made to read from there.

use crate::error::{Error, ErrorKind, Result};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use url::{Host, Url};

/// Metadata services outside the link-local ranges: of AWS (IPv6), Alibaba and Oracle.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
const METADATA_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];

/// Resolves host names with the system's resolver, and leaves out the addresses that are refused.
pub(super) struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let allowed: Vec<_> = found.iter().copied().filter(|address| !is_refused(address.ip())).collect();
            if allowed.is_empty() && !found.is_empty() {
                return Err("the name resolves to a link-local address, which is refused".into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// Fails if the host of `url` is an address that is refused.
///
/// # Errors
/// `Invalid`.
pub(super) fn check_host(url: &Url) -> Result<()> {
    let address = match url.host() {
        Some(Host::Ipv4(address)) => IpAddr::V4(address),
        Some(Host::Ipv6(address)) => IpAddr::V6(address),
        _ => return Ok(()),
    };
    match is_refused(address) {
        true => Err(Error::new(ErrorKind::Invalid, format!("{address} is a link-local address; not requested"))
            .hint("the daemon reads nothing from metadata services; use another address for the server")),
        false => Ok(()),
    }
}

/// Returns true for link-local addresses and those of metadata services.
fn is_refused(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_link_local() || METADATA_V4.contains(&address),
        IpAddr::V6(address) => address.is_unicast_link_local() || address == METADATA_V6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_services_are_refused_in_every_spelling() {
        for text in [
            "http://169.254.169.254/latest/meta-data",
            "http://2852039166/",
            "http://0xA9FEA9FE/",
            "http://[::ffff:169.254.169.254]/",
            "http://[fe80::1]/",
            "http://[fd00:ec2::254]/",
            "http://100.100.100.200/",
        ] {
            let url = Url::parse(text).expect(text);
            assert_eq!(check_host(&url).expect_err(text).kind(), ErrorKind::Invalid, "{text}");
        }
        for text in ["http://127.0.0.1/", "http://10.0.0.1/", "http://[::1]/", "https://huggingface.co/"] {
            check_host(&Url::parse(text).expect(text)).expect(text);
        }
    }
}
