//! Which kinds of IP addresses a host's name may stand for.

use std::net::SocketAddr;

/// Whether an address of that family may be used: if one family is asked for, the other is not unless it is, too.
pub fn is_family_allowed(ipv4: Option<bool>, ipv6: Option<bool>, address: &SocketAddr) -> bool {
    let (asked, other) = if address.is_ipv4() {
        (ipv4, ipv6)
    } else {
        (ipv6, ipv4)
    };
    asked.unwrap_or(other != Some(true))
}
