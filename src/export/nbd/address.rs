//! Addresses a server listens at.

use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, sockopt,
};

use crate::error::{Error, ErrorKind, Result};
use crate::nbd::is_family_allowed;
use crate::runtime::remove_socket;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerAddress {
    /// A UNIX socket; a socket file that is there is replaced.
    Unix(PathBuf),
    /// TCP.
    Inet(InetAddress),
}

/// A TCP address, in the terms of QEMU's `InetSocketAddress`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InetAddress {
    /// Host name or address; empty for all of the host's own.
    pub host: String,
    /// Port; 0 for any that is free.
    pub port: u16,
    /// Last port to try.
    pub to: Option<u16>,
    /// Whether IPv4 is allowed; see [`InetAddress::allows`].
    pub ipv4: Option<bool>,
    /// Whether IPv6 is allowed.
    pub ipv6: Option<bool>,
    /// The host is an address, not to be looked up.
    pub numeric: bool,
}

/// A bound socket, and where it is bound.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) descriptor: OwnedFd,
    pub(super) bound: Bound,
}

/// Where a listening socket is bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    Unix(PathBuf),
    Inet(SocketAddr),
}

impl ServerAddress {
    /// Listen at the address. May wait for a name service.
    ///
    /// # Errors
    ///
    /// The name cannot be resolved, or no socket can be bound.
    pub(super) fn listen(&self) -> Result<Vec<Listener>> {
        match self {
            Self::Unix(path) => listen_unix(path).map(|listener| vec![listener]),
            Self::Inet(address) => address.listen(),
        }
    }
}

impl InetAddress {
    fn allows(&self, address: &SocketAddr) -> bool {
        is_family_allowed(self.ipv4, self.ipv6, address)
    }

    fn resolve(&self) -> Result<Vec<SocketAddr>> {
        let failed = |reason: String| {
            let text = format!(
                "address resolution failed for {}:{}: {reason}",
                self.host, self.port
            );
            Error::new(ErrorKind::NotFound, text)
        };
        if self.host.is_empty() {
            return Ok(vec![
                SocketAddr::from(([0; 4], self.port)),
                SocketAddr::from(([0u16; 8], self.port)),
            ]);
        }
        if self.numeric && self.host.parse::<std::net::IpAddr>().is_err() {
            return Err(failed("Name or service not known".into()));
        }
        match (self.host.as_str(), self.port).to_socket_addrs() {
            Ok(addresses) => Ok(addresses.collect()),
            Err(error) => Err(failed(error.to_string()).with_source(error)),
        }
    }

    fn listen(&self) -> Result<Vec<Listener>> {
        let addresses = self.resolve()?;
        let mut listeners = Vec::new();
        let mut failure = Errno::EADDRNOTAVAIL;
        for address in addresses.into_iter().filter(|address| self.allows(address)) {
            match self.listen_in_range(address) {
                Ok(listener) => listeners.push(listener),
                Err(errno) => failure = errno,
            }
        }
        if listeners.is_empty() {
            return Err(Error::sys(failure, "Failed to bind socket"));
        }
        Ok(listeners)
    }

    fn listen_in_range(&self, address: SocketAddr) -> nix::Result<Listener> {
        let last = self.to.unwrap_or(self.port).max(self.port);
        let mut result = Err(Errno::EADDRINUSE);
        for port in self.port..=last {
            result = listen_inet(SocketAddr::new(address.ip(), port));
            if !matches!(result, Err(Errno::EADDRINUSE)) {
                break;
            }
        }
        result
    }
}

fn listen_unix(path: &Path) -> Result<Listener> {
    let failed = |error: std::io::Error| {
        let errno = error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw);
        Error::sys(
            errno,
            format!("Failed to bind socket to {}", path.display()),
        )
        .with_source(error)
    };
    if path.as_os_str().len() > 107 {
        let text = format!("UNIX socket path '{}' is too long", path.display());
        return Err(Error::new(ErrorKind::InvalidArgument, text));
    }
    remove_socket(path).map_err(failed)?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    Ok(Listener {
        descriptor: listener.into(),
        bound: Bound::Unix(path.to_owned()),
    })
}

fn listen_inet(address: SocketAddr) -> nix::Result<Listener> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let descriptor = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&descriptor, sockopt::ReuseAddr, &true)?;
    if family == AddressFamily::Inet6 {
        socket::setsockopt(&descriptor, sockopt::Ipv6V6Only, &true)?;
    }
    let raw = std::os::fd::AsRawFd::as_raw_fd(&descriptor);
    socket::bind(raw, &SockaddrStorage::from(address))?;
    socket::listen(&descriptor, Backlog::new(BACKLOG)?)?;
    let listener = TcpListener::from(descriptor);
    let bound = listener.local_addr().map_err(|_| Errno::EIO)?;
    Ok(Listener {
        descriptor: listener.into(),
        bound: Bound::Inet(bound),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inet(host: &str, port: u16) -> InetAddress {
        InetAddress {
            host: host.into(),
            port,
            ..InetAddress::default()
        }
    }

    #[test]
    fn failures_read_as_in_qemu() {
        let error = ServerAddress::Unix("nodir/x.sock".into())
            .listen()
            .unwrap_err();
        assert_eq!(
            error.message(),
            "Failed to bind socket to nodir/x.sock: No such file or directory"
        );
        let error = ServerAddress::Inet(inet("203.0.113.1", 1))
            .listen()
            .unwrap_err();
        assert_eq!(
            error.message(),
            "Failed to bind socket: Cannot assign requested address"
        );
    }

    /// It was removed, an image as well as anything else.
    #[test]
    fn a_file_in_the_place_of_the_socket_stays() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, "data").unwrap();
        let address = ServerAddress::Unix(path.clone());
        let error = address.listen().unwrap_err();
        assert!(
            error
                .message()
                .ends_with("disk.raw: Address already in use"),
            "{error}"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        std::fs::remove_file(&path).unwrap();
        drop(address.listen().unwrap());
        address.listen().expect("an old socket is replaced");
    }

    #[test]
    fn a_used_port_is_skipped_if_there_are_more() {
        let taken = inet("127.0.0.1", 0).listen().unwrap();
        let Bound::Inet(address) = taken[0].bound else {
            panic!()
        };
        let mut wanted = inet("127.0.0.1", address.port());
        assert!(wanted.listen().is_err());
        wanted.to = Some(address.port().saturating_add(20));
        assert!(wanted.listen().is_ok());
    }

    #[test]
    fn one_family_asked_for_excludes_the_other() {
        let v6 = SocketAddr::from(([0u16; 8], 1));
        assert!(inet("h", 1).allows(&v6));
        assert!(
            !InetAddress {
                ipv4: Some(true),
                ..inet("h", 1)
            }
            .allows(&v6)
        );
        assert!(
            InetAddress {
                ipv4: Some(true),
                ipv6: Some(true),
                ..inet("h", 1)
            }
            .allows(&v6)
        );
    }
}
