//! Where a server is, and getting there.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use nix::errno::Errno;
use nix::sys::socket::{
    self, AddressFamily, SockFlag, SockType, SockaddrStorage, UnixAddr, sockopt,
};

use crate::error::{Error, ErrorKind, Result, strerror};
use crate::nbd::is_family_allowed;
use crate::runtime::Handle;
use crate::runtime::ring::RingFile;

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdAddress {
    /// Path of a UNIX socket.
    Unix(String),
    /// TCP.
    Inet {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
        /// Whether IPv4 may be used; if only the other family is asked for, it may not.
        ipv4: Option<bool>,
        /// Whether IPv6 may be used.
        ipv6: Option<bool>,
        /// The host is an address, not to be looked up.
        numeric: bool,
    },
}

impl NbdAddress {
    /// As messages tell it.
    fn name(&self) -> String {
        match self {
            NbdAddress::Unix(path) => path.clone(),
            NbdAddress::Inet { host, port, .. } => format!("{host}:{port}"),
        }
    }

    /// A connected socket.
    ///
    /// # Errors
    /// In QEMU's words: nobody listens, or the name is not known.
    pub(super) async fn connect(&self, handle: &Handle) -> Result<Rc<RingFile>> {
        let failed = |errno: Errno| {
            let name = self.name();
            let message = format!("Failed to connect to '{name}': {}", strerror(errno));
            Error::from_errno(errno, message)
        };
        if let NbdAddress::Unix(path) = self {
            let descriptor = connect_unix(path).map_err(failed)?;
            return Ok(handle.ring().file(descriptor));
        }
        let address = self.clone();
        let found = handle.blocking(move || address.resolve()).await?;
        let mut failure = Errno::EADDRNOTAVAIL;
        for address in found.into_iter().filter(|address| self.allows(address)) {
            match connect_inet(handle, address).await {
                Ok(file) => return Ok(file),
                Err(errno) => failure = errno,
            }
        }
        Err(failed(failure))
    }

    fn allows(&self, address: &SocketAddr) -> bool {
        let NbdAddress::Inet { ipv4, ipv6, .. } = self else {
            return false;
        };
        is_family_allowed(*ipv4, *ipv6, address)
    }

    fn resolve(&self) -> Result<Vec<SocketAddr>> {
        let NbdAddress::Inet {
            host,
            port,
            numeric,
            ..
        } = self
        else {
            return Ok(Vec::new());
        };
        let failed = || {
            let name = self.name();
            let message =
                format!("address resolution failed for {name}: Name or service not known");
            Error::new(ErrorKind::NotFound, message)
        };
        if *numeric && host.parse::<std::net::IpAddr>().is_err() {
            return Err(failed());
        }
        match (host.as_str(), *port).to_socket_addrs() {
            Ok(addresses) => Ok(addresses.collect()),
            Err(error) => Err(failed().with_source(error)),
        }
    }
}

/// Does not wait: where a server has no room for another connection, it is refused.
fn connect_unix(path: &str) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let descriptor = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(descriptor.as_raw_fd(), &UnixAddr::new(path)?)?;
    let stream = UnixStream::from(descriptor);
    stream.set_nonblocking(false).map_err(|_| Errno::EIO)?;
    Ok(stream.into())
}

async fn connect_inet(handle: &Handle, address: SocketAddr) -> nix::Result<Rc<RingFile>> {
    let family = if address.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let descriptor = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // Slower at worst.
    let _ = socket::setsockopt(&descriptor, sockopt::TcpNoDelay, &true);
    let file = handle.ring().file(descriptor);
    let connected = handle.ring().connect(&file, SockaddrStorage::from(address));
    connected.await.map_err(|error| error.errno())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_family_asked_for_excludes_the_other() {
        let address = |ipv4, ipv6| NbdAddress::Inet {
            host: "h".to_owned(),
            port: 1,
            ipv4,
            ipv6,
            numeric: false,
        };
        let v6 = SocketAddr::from(([0u16; 8], 1));
        assert!(address(None, None).allows(&v6));
        assert!(!address(Some(true), None).allows(&v6));
        assert!(address(Some(true), Some(true)).allows(&v6));
        assert!(!address(None, Some(false)).allows(&v6));
    }
}
