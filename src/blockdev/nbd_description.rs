//! An NBD server as somebody describes it: by options, or by a name.

use std::time::Duration;

use crate::block::NodeOptions;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::{DEFAULT_PORT, MAX_STRING_LENGTH, percent_encoded};
use crate::protocol::nbd::{NbdAddress, NbdOptions};

use super::value::{Reader, invalid};

/// Options of `nbd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdDescription {
    /// `server`.
    pub address: NbdAddress,
    /// `export`.
    pub export: Option<String>,
    /// `reconnect-delay`.
    pub reconnect_delay: Duration,
    /// `open-timeout`.
    pub open_timeout: Duration,
}

impl NbdDescription {
    fn new(address: NbdAddress, export: Option<String>) -> Result<NbdDescription> {
        let name = export.as_deref().unwrap_or_default();
        if name.len() > MAX_STRING_LENGTH || name.contains('\0') {
            return Err(invalid("export name too long to send to server"));
        }
        Ok(NbdDescription {
            address,
            export,
            reconnect_delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
        })
    }

    pub(super) fn parse(reader: &mut Reader) -> Result<NbdDescription> {
        let Some(mut server) = reader.map("server")? else {
            return Err(reader.missing("server"));
        };
        let address = parse_address(&mut server)?;
        server.finish("nbd")?;
        let mut description = NbdDescription::new(address, reader.string("export")?)?;
        let seconds = |value: Option<u64>| Duration::from_secs(value.unwrap_or(0));
        description.reconnect_delay = seconds(reader.unsigned("reconnect-delay")?);
        description.open_timeout = seconds(reader.unsigned("open-timeout")?);
        Ok(description)
    }

    /// What a name means that begins as those of NBD servers do: `nbd:host:port`, `nbd:unix:path`, both with
    /// `:exportname=`, and URIs; none where it begins otherwise.
    pub fn of_name(name: &str) -> Option<Result<NbdDescription>> {
        let uri = |rest: Option<&str>, is_unix| rest.map(|rest| parse_uri(name, rest, is_unix));
        uri(name.strip_prefix("nbd+unix://"), true)
            .or_else(|| uri(name.strip_prefix("nbd+tcp://"), false))
            .or_else(|| uri(name.strip_prefix("nbd://"), false))
            .or_else(|| name.strip_prefix("nbd:").map(parse_old_name))
    }

    /// The name by which QEMU calls it.
    pub(super) fn file_name(&self) -> String {
        let export = percent_encoded(self.export.as_deref().unwrap_or_default(), b"");
        let slash = if export.is_empty() { "" } else { "/" };
        match &self.address {
            NbdAddress::Unix(path) => format!("nbd+unix://{slash}{export}?socket={path}"),
            NbdAddress::Inet { host, port, .. } => format!("nbd://{host}:{port}{slash}{export}"),
        }
    }

    /// Its option that is another one than in `now`.
    pub(super) fn difference(&self, now: &NbdDescription) -> Option<&'static str> {
        let changed = [
            ("server", self.address != now.address),
            ("export", self.export != now.export),
            (
                "reconnect-delay",
                self.reconnect_delay != now.reconnect_delay,
            ),
            ("open-timeout", self.open_timeout != now.open_timeout),
        ];
        changed
            .iter()
            .find(|(_, differs)| *differs)
            .map(|(name, _)| *name)
    }

    /// For a node with these options.
    pub(super) fn options(&self, node: &NodeOptions) -> NbdOptions {
        NbdOptions {
            address: self.address.clone(),
            export: self.export.clone().unwrap_or_default(),
            reconnect_delay: self.reconnect_delay,
            open_timeout: self.open_timeout,
            writable: !node.read_only,
            auto_read_only: node.auto_read_only,
        }
    }
}

fn parse_address(server: &mut Reader) -> Result<NbdAddress> {
    let kind = server.required_string("type")?;
    match kind.as_str() {
        "unix" => server.required_string("path").map(NbdAddress::Unix),
        "inet" => {
            let host = server.required_string("host")?;
            let port = server.required_string("port")?;
            if server.take("to").is_some() {
                let message = "Option 'server.to' of driver 'nbd' is not supported";
                return Err(Error::new(ErrorKind::Unsupported, message));
            }
            Ok(NbdAddress::Inet {
                port: parse_port(&host, &port)?,
                host,
                ipv4: server.bool("ipv4")?,
                ipv6: server.bool("ipv6")?,
                numeric: server.bool("numeric")?.unwrap_or(false),
            })
        }
        other => Err(invalid(format!(
            "Parameter 'server.type' does not accept value '{other}'"
        ))),
    }
}

fn parse_port(host: &str, port: &str) -> Result<u16> {
    port.parse().map_err(|_| {
        invalid(format!(
            "address resolution failed for {host}:{port}: Servname not supported for ai_socktype"
        ))
    })
}

fn inet(host: &str, port: &str) -> Result<NbdAddress> {
    Ok(NbdAddress::Inet {
        host: host.to_owned(),
        port: parse_port(host, port)?,
        ipv4: None,
        ipv6: None,
        numeric: false,
    })
}

fn parse_old_name(rest: &str) -> Result<NbdDescription> {
    let (server, export) = match rest.split_once(":exportname=") {
        Some((server, export)) => (server, Some(export.to_owned())),
        None => (rest, None),
    };
    if let Some(path) = server.strip_prefix("unix:") {
        return NbdDescription::new(NbdAddress::Unix(path.to_owned()), export);
    }
    let (host, port) = server
        .rsplit_once(':')
        .ok_or_else(|| invalid("File name does not say which host and port: nbd:host:port"))?;
    NbdDescription::new(inet(unbracketed(host), port)?, export)
}

fn parse_uri(name: &str, rest: &str, is_unix: bool) -> Result<NbdDescription> {
    let wrong = || invalid(format!("'{name}' is no valid NBD URI"));
    let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path).ok_or_else(wrong)?;
    let export = Some(export).filter(|export| !export.is_empty());
    if is_unix {
        let socket = query.strip_prefix("socket=").and_then(decode);
        let path = socket.filter(|path| authority.is_empty() && !path.is_empty());
        return NbdDescription::new(NbdAddress::Unix(path.ok_or_else(wrong)?), export);
    }
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port.to_owned()),
        _ => (authority, DEFAULT_PORT.to_string()),
    };
    if !query.is_empty() || host.is_empty() || host.contains('@') {
        return Err(wrong());
    }
    NbdDescription::new(inet(unbracketed(host), &port)?, export)
}

/// An IPv6 address stands in brackets.
fn unbracketed(host: &str) -> &str {
    let inner = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    inner.unwrap_or(host)
}

fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next())?, digit(rest.next())?);
        bytes.push((high * 16 + low) as u8);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> NbdDescription {
        let described = NbdDescription::of_name(name).expect("an NBD name");
        described.expect("a valid one")
    }

    #[test]
    fn names_mean_what_they_mean_to_qemu() {
        for (name, shown) in [
            (
                "nbd:localhost:49153:exportname=disk",
                "nbd://localhost:49153/disk",
            ),
            ("nbd:unix:/run/n.sock", "nbd+unix://?socket=/run/n.sock"),
            (
                "nbd:unix:n.sock:exportname=a b",
                "nbd+unix:///a%20b?socket=n.sock",
            ),
            ("nbd://host/x%41", "nbd://host:10809/xA"),
            ("nbd+tcp://[::1]:5", "nbd://::1:5"),
            ("nbd+unix:///e?socket=/s", "nbd+unix:///e?socket=/s"),
        ] {
            assert_eq!(named(name).file_name(), shown, "{name}");
        }
        assert!(NbdDescription::of_name("./nbd:x").is_none());
    }

    #[test]
    fn bad_names_are_refused() {
        for name in [
            "nbd:",
            "nbd:host",
            "nbd:host:port",
            "nbd://",
            "nbd://host/%4",
            "nbd://host/%ff",
            "nbd://host?tls=1",
            "nbd+unix:///e",
            "nbd+unix://host/e?socket=s",
            "nbd:h:99999",
        ] {
            let described = NbdDescription::of_name(name).expect("an NBD name");
            assert!(described.is_err(), "{name}");
        }
    }
}
