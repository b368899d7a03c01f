//! The classic notation of `--chardev`: `BACKEND,id=ID,key=value,flag…`, flat and untyped.

use super::error::QmpError;

/// A character device: where a monitor's client comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chardev {
    /// The name by which a monitor refers to it.
    pub id: String,
    /// What it is.
    pub backend: Backend,
}

/// The kinds of character devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Nobody ever connects.
    Null,
    /// Standard input and output.
    Stdio,
    /// A stream socket.
    Socket {
        /// Where.
        address: Address,
        /// Which end we are.
        role: Role,
    },
}

/// Which end of a connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// We connect, once.
    Client,
    /// We listen.
    Server {
        /// Start-up waits for the first client.
        wait: bool,
    },
}

/// An address of a stream socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A socket in the file system.
    Unix(String),
    /// Host and port, either by name or number.
    Inet {
        /// The host; empty for any.
        host: String,
        /// The port.
        port: String,
    },
}

/// The backends there are.
pub const BACKENDS: &[&str] = &["null", "socket", "stdio"];

/// Options that QEMU has and that are refused.
const REFUSED: &[&str] = &[
    "abstract",
    "append",
    "chardev",
    "cols",
    "delay",
    "fd",
    "height",
    "in",
    "input-path",
    "ipv4",
    "ipv6",
    "keep-alive",
    "localaddr",
    "localport",
    "logappend",
    "logfile",
    "mouse",
    "mptcp",
    "mux",
    "name",
    "nodelay",
    "numeric",
    "reconnect",
    "reconnect-ms",
    "rows",
    "size",
    "telnet",
    "tight",
    "tls-authz",
    "tls-creds",
    "tn3270",
    "to",
    "websocket",
    "width",
];

const NOT_AN_IDENTIFIER: &str = "Parameter 'id' expects an identifier\n\
    Identifiers consist of letters, digits, '-', '.', '_', starting with a letter.";

impl Chardev {
    /// Reads the option's argument; warnings about outdated notation go to `warn`.
    ///
    /// # Errors
    /// Unknown or refused options, and combinations that make no sense.
    pub fn parse(text: &str, warn: impl FnMut(String)) -> Result<Chardev, QmpError> {
        let options = Options::parse(text, warn);
        let id = options.text("id");
        if id.is_some_and(|id| !is_identifier(id)) {
            return Err(QmpError::generic(NOT_AN_IDENTIFIER));
        }
        options.check_names()?;
        let id = id.ok_or_else(|| QmpError::generic("chardev: no id specified"))?;
        let backend = match options.text("backend") {
            None => return Err(generic(format_args!("chardev: \"{id}\" missing backend"))),
            Some("null") => Backend::Null,
            Some("stdio") => options.stdio()?,
            Some("socket") => options.socket()?,
            Some(other) => {
                return Err(generic(format_args!(
                    "'{other}' is not a valid char driver name"
                )));
            }
        };
        Ok(Chardev {
            id: id.into(),
            backend,
        })
    }
}

/// Whether the argument asks for the list of backends.
pub fn asks_for_help(text: &str) -> bool {
    text.split(',').any(|item| matches!(item, "help" | "?"))
}

/// Letters, digits, `-`, `.`, `_`, a letter first: what names of objects and the like are made of.
pub fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// Key and value in the order given.
struct Options(Vec<(String, String)>);

impl Options {
    fn parse(text: &str, mut warn: impl FnMut(String)) -> Options {
        let mut pairs = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (item, more) = take_item(rest);
            let first = rest.len() == text.len();
            rest = more;
            let pair = match item.split_once('=') {
                Some((key, value)) => (key.into(), value.into()),
                None if first => ("backend".into(), item),
                None => short_form(&item, &mut warn),
            };
            pairs.push(pair);
        }
        Options(pairs)
    }

    fn check_names(&self) -> Result<(), QmpError> {
        const KNOWN: &[&str] = &[
            "backend", "host", "id", "path", "port", "server", "signal", "wait",
        ];
        for (name, _) in &self.0 {
            if REFUSED.contains(&name.as_str()) {
                return Err(generic(format_args!("Parameter '{name}' is not supported")));
            }
            if !KNOWN.contains(&name.as_str()) {
                return Err(generic(format_args!("Invalid parameter '{name}'")));
            }
        }
        self.bool("server")?;
        self.bool("wait")?;
        self.bool("signal").map(drop)
    }

    fn stdio(&self) -> Result<Backend, QmpError> {
        self.only_for("stdio", &["signal"])?;
        match self.bool("signal")? {
            Some(false) => Err(QmpError::generic(
                "Parameter 'signal' is not supported: the terminal's signals are kept",
            )),
            _ => Ok(Backend::Stdio),
        }
    }

    fn socket(&self) -> Result<Backend, QmpError> {
        self.only_for("socket", &["host", "path", "port", "server", "wait"])?;
        let address = self.address()?;
        let role = match (self.bool("server")?, self.bool("wait")?) {
            (Some(true), wait) => Role::Server {
                wait: wait.unwrap_or(true),
            },
            (_, None) => Role::Client,
            (_, Some(_)) => {
                return Err(QmpError::generic(
                    "'wait' option is incompatible with socket in client connect mode",
                ));
            }
        };
        Ok(Backend::Socket { address, role })
    }

    fn address(&self) -> Result<Address, QmpError> {
        let text = |name| self.text(name).map(str::to_owned);
        match (text("path"), text("host"), text("port")) {
            (Some(_), Some(_), _) => Err(QmpError::generic(
                "None or one of 'path', 'fd' or 'host' option required.",
            )),
            (Some(path), None, _) => Ok(Address::Unix(path)),
            (None, host, Some(port)) => Ok(Address::Inet {
                host: host.unwrap_or_default(),
                port,
            }),
            (None, Some(_), None) => Err(QmpError::generic("chardev: socket: no port given")),
            (None, None, None) => Err(QmpError::generic(
                "chardev: socket: no path and no port given",
            )),
        }
    }

    fn only_for(&self, backend: &str, names: &[&str]) -> Result<(), QmpError> {
        let known = |name: &str| matches!(name, "backend" | "id") || names.contains(&name);
        match self.0.iter().find(|(name, _)| !known(name)) {
            None => Ok(()),
            Some((name, _)) => Err(generic(format_args!(
                "Parameter '{name}' is not supported for backend '{backend}'"
            ))),
        }
    }

    /// The value; the last one wins.
    fn text(&self, name: &str) -> Option<&str> {
        let mut pairs = self.0.iter().rev();
        pairs
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    fn bool(&self, name: &str) -> Result<Option<bool>, QmpError> {
        match self.text(name) {
            None => Ok(None),
            Some("on" | "yes" | "true" | "y") => Ok(Some(true)),
            Some("off" | "no" | "false" | "n") => Ok(Some(false)),
            Some(_) => Err(generic(format_args!(
                "Parameter '{name}' expects 'on' or 'off'"
            ))),
        }
    }
}

fn take_item(text: &str) -> (String, &str) {
    let mut item = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(',') {
        item.push_str(before);
        match after.strip_prefix(',') {
            Some(more) => {
                item.push(',');
                rest = more;
            }
            None => return (item, after),
        }
    }
    item.push_str(rest);
    (item, "")
}

/// `server` for `server=on`, `nowait` for `wait=off`.
fn short_form(item: &str, warn: &mut impl FnMut(String)) -> (String, String) {
    let (name, value) = match item.strip_prefix("no") {
        Some(name) if !name.is_empty() => (name, "off"),
        _ => (item, "on"),
    };
    warn(format!(
        "short-form boolean option '{item}' deprecated\nPlease use {name}={value} instead"
    ));
    (name.into(), value.into())
}

fn generic(text: std::fmt::Arguments<'_>) -> QmpError {
    QmpError::generic(text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Backend, String> {
        let parsed = Chardev::parse(text, |warning| panic!("{warning}"));
        parsed
            .map(|chardev| chardev.backend)
            .map_err(|error| error.desc)
    }

    #[test]
    fn sockets_of_both_kinds_and_ends() {
        let unix = |role| Backend::Socket {
            address: Address::Unix("m,s".into()),
            role,
        };
        let server = Role::Server { wait: false };
        assert_eq!(
            parse("socket,id=m,path=m,,s,server=on,wait=off"),
            Ok(unix(server))
        );
        let server = Role::Server { wait: true };
        assert_eq!(parse("socket,id=m,path=m,,s,server=on"), Ok(unix(server)));
        assert_eq!(parse("socket,id=m,path=m,,s"), Ok(unix(Role::Client)));
        let address = Address::Inet {
            host: "::1".into(),
            port: "0".into(),
        };
        let role = Role::Client;
        assert_eq!(
            parse("socket,id=m,host=::1,port=0"),
            Ok(Backend::Socket { address, role })
        );
        assert_eq!(parse("stdio,id=m"), Ok(Backend::Stdio));
        assert_eq!(parse("backend=null,id=m"), Ok(Backend::Null));
    }

    #[test]
    fn short_forms_warn() {
        let mut warnings = Vec::new();
        let text = "socket,id=m,path=p,server,nowait";
        let chardev = Chardev::parse(text, |warning| warnings.push(warning)).unwrap();
        let expected = "socket,id=m,path=p,server=on,wait=off";
        assert_eq!(parse(expected), Ok(chardev.backend));
        assert_eq!(
            warnings,
            [
                "short-form boolean option 'server' deprecated\nPlease use server=on instead",
                "short-form boolean option 'nowait' deprecated\nPlease use wait=off instead"
            ]
        );
    }

    /// Each was put to qemu-storage-daemon 10.0.2, which answered with these texts.
    #[test]
    fn errors_are_worded_as_qemu_words_them() {
        let wait = "'wait' option is incompatible with socket in client connect mode";
        for (text, error) in [
            (
                "socket,id=m,path=p,server=maybe",
                "Parameter 'server' expects 'on' or 'off'",
            ),
            ("socket,id=m,path=p,bogus=1", "Invalid parameter 'bogus'"),
            ("socket,path=p", "chardev: no id specified"),
            ("", "chardev: no id specified"),
            ("id=m", "chardev: \"m\" missing backend"),
            ("nosuch,id=m", "'nosuch' is not a valid char driver name"),
            ("socket,id=1m,path=p", NOT_AN_IDENTIFIER),
            ("socket,id=m,host=h", "chardev: socket: no port given"),
            (
                "socket,id=m,path=p,host=h,port=2",
                "None or one of 'path', 'fd' or 'host' option required.",
            ),
            ("socket,id=m,path=p,server=off,wait=on", wait),
            ("socket,id=m,path=p,=3", "Invalid parameter ''"),
        ] {
            assert_eq!(parse(text), Err(error.into()), "{text}");
        }
    }

    #[test]
    fn what_we_do_not_have_is_refused() {
        let error = "Parameter 'telnet' is not supported";
        assert_eq!(parse("socket,id=m,path=p,telnet=on"), Err(error.into()));
        let error = "Parameter 'path' is not supported for backend 'stdio'";
        assert_eq!(parse("stdio,id=m,path=p"), Err(error.into()));
    }
}
