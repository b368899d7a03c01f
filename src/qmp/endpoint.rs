//! Where a monitor's clients come from: sockets are bound and connected here, once, at start-up.

use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::chardev::{Address, Backend, Role};
use super::error::QmpError;
use crate::error::{Error, strerror};
use crate::runtime::{Handle, remove_socket};

/// Bytes in a UNIX socket's path at most.
const UNIX_PATH_MAX: usize = 107;

/// A source of clients.
#[derive(Debug)]
pub enum Endpoint {
    /// None ever come.
    Null,
    /// One is there: standard input and output.
    Stdio {
        /// Bytes from the client.
        input: OwnedFd,
        /// Bytes to the client.
        output: OwnedFd,
    },
    /// One is there, connected.
    Connected(OwnedFd),
    /// They connect, one after the other.
    Listening {
        /// Where.
        listener: OwnedFd,
        /// One has connected already.
        first: Option<OwnedFd>,
    },
}

impl Endpoint {
    /// Binds, or connects.
    ///
    /// # Errors
    /// As the system says, in QEMU's words.
    pub fn open(backend: &Backend) -> Result<Endpoint, QmpError> {
        match backend {
            Backend::Null => Ok(Endpoint::Null),
            Backend::Stdio => stdio(),
            Backend::Socket { address, role } => match (address, role) {
                (Address::Unix(path), Role::Server { .. }) => listen_unix(path),
                (Address::Unix(path), Role::Client) => connect_unix(path),
                (Address::Inet { host, port }, Role::Server { .. }) => listen_inet(host, port),
                (Address::Inet { host, port }, Role::Client) => connect_inet(host, port),
            },
        }
    }

    /// Waits for a client of a listening endpoint; it is the first that the monitor will serve.
    ///
    /// # Errors
    /// As accept(2).
    pub async fn with_first_client(self, handle: &Handle) -> Result<Endpoint, QmpError> {
        let Endpoint::Listening { listener, .. } = self else {
            return Ok(self);
        };
        let duplicate = listener.try_clone().map_err(Error::from)?;
        let accepting = handle.ring().file(duplicate);
        let first = Some(handle.ring().accept(&accepting).await?);
        Ok(Endpoint::Listening { listener, first })
    }
}

fn listening(listener: OwnedFd) -> Endpoint {
    Endpoint::Listening {
        listener,
        first: None,
    }
}

/// Duplicates, so that the monitor owns what it closes.
fn stdio() -> Result<Endpoint, QmpError> {
    let duplicate = |descriptor: std::io::Result<OwnedFd>| {
        descriptor.map_err(|error| failed("Failed to use standard input and output", &error))
    };
    Ok(Endpoint::Stdio {
        input: duplicate(std::io::stdin().as_fd().try_clone_to_owned())?,
        output: duplicate(std::io::stdout().as_fd().try_clone_to_owned())?,
    })
}

fn listen_unix(path: &str) -> Result<Endpoint, QmpError> {
    check_unix_path(path)?;
    remove_stale_socket(path);
    let listener = UnixListener::bind(path)
        .map_err(|error| failed(&format!("Failed to bind socket to {path}"), &error))?;
    Ok(listening(listener.into()))
}

fn connect_unix(path: &str) -> Result<Endpoint, QmpError> {
    check_unix_path(path)?;
    let stream = UnixStream::connect(path)
        .map_err(|error| failed(&format!("Failed to connect to '{path}'"), &error))?;
    Ok(Endpoint::Connected(stream.into()))
}

fn check_unix_path(path: &str) -> Result<(), QmpError> {
    if path.len() > UNIX_PATH_MAX {
        let text = format!("UNIX socket path '{path}' is too long");
        return Err(QmpError::generic(text));
    }
    Ok(())
}

/// A socket that an earlier server left behind goes; anything else stays, and binding fails.
fn remove_stale_socket(path: &str) {
    if let Err(error) = remove_socket(Path::new(path)) {
        tracing::warn!(path, %error, "old socket could not be removed");
    }
}

fn listen_inet(host: &str, port: &str) -> Result<Endpoint, QmpError> {
    let any = if host.is_empty() { "::" } else { host };
    let addresses = resolve(any, port)?;
    let listener =
        TcpListener::bind(&*addresses).map_err(|error| failed("Failed to bind socket", &error))?;
    Ok(listening(listener.into()))
}

fn connect_inet(host: &str, port: &str) -> Result<Endpoint, QmpError> {
    let local = if host.is_empty() { "localhost" } else { host };
    let addresses = resolve(local, port)?;
    let stream = TcpStream::connect(&*addresses)
        .and_then(|stream| stream.set_nodelay(true).map(|()| stream))
        .map_err(|error| failed(&format!("Failed to connect to '{host}:{port}'"), &error))?;
    Ok(Endpoint::Connected(stream.into()))
}

fn resolve(host: &str, port: &str) -> Result<Vec<std::net::SocketAddr>, QmpError> {
    let failed = |reason: &str| {
        let text = format!("address resolution failed for {host}:{port}: {reason}");
        QmpError::generic(text)
    };
    let Ok(number) = port.parse::<u16>() else {
        return Err(failed("Servname not supported for ai_socktype"));
    };
    match (host, number).to_socket_addrs() {
        Ok(addresses) => Ok(addresses.collect()),
        Err(error) => {
            let text = error.to_string();
            let reason = text.rsplit(": ").next().unwrap_or_default();
            Err(failed(reason))
        }
    }
}

/// `what: STRERROR`, without the number that `std` appends.
fn failed(what: &str, error: &std::io::Error) -> QmpError {
    let reason = match error.raw_os_error() {
        Some(errno) => strerror(nix::errno::Errno::from_raw(errno)),
        None => error.to_string(),
    };
    QmpError::generic(format!("{what}: {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(address: Address, role: Role) -> String {
        let backend = Backend::Socket { address, role };
        Endpoint::open(&backend).unwrap_err().desc
    }

    fn inet(host: &str, port: &str) -> Address {
        Address::Inet {
            host: host.into(),
            port: port.into(),
        }
    }

    /// Each was put to qemu-storage-daemon 10.0.2 as `--chardev`, which answered with these texts.
    #[test]
    fn failures_are_worded_as_qemu_words_them() {
        let server = Role::Server { wait: false };
        let missing = || Address::Unix("nodir/m.sock".into());
        assert_eq!(
            error(missing(), server),
            "Failed to bind socket to nodir/m.sock: No such file or directory"
        );
        assert_eq!(
            error(missing(), Role::Client),
            "Failed to connect to 'nodir/m.sock': No such file or directory"
        );
        let long = "a".repeat(108);
        assert_eq!(
            error(Address::Unix(long.clone()), server),
            format!("UNIX socket path '{long}' is too long")
        );
        assert_eq!(
            error(inet("203.0.113.1", "1"), server),
            "Failed to bind socket: Cannot assign requested address"
        );
        assert_eq!(
            error(inet("127.0.0.1", "x"), server),
            "address resolution failed for 127.0.0.1:x: Servname not supported for ai_socktype"
        );
        assert_eq!(
            error(inet("127.0.0.1", "1"), Role::Client),
            "Failed to connect to '127.0.0.1:1': Connection refused"
        );
    }

    #[test]
    fn only_a_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s").to_str().unwrap().to_owned();
        let backend = Backend::Socket {
            address: Address::Unix(path.clone()),
            role: Role::Server { wait: false },
        };
        drop(Endpoint::open(&backend).unwrap());
        drop(Endpoint::open(&backend).unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = Endpoint::open(&backend).unwrap_err();
        assert!(error.desc.ends_with("Address already in use"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
