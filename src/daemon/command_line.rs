//! The command line: qemu-storage-daemon's options, read as GNU getopt_long reads them.

/// One option with its argument, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// `--blockdev`
    Blockdev(String),
    /// `--chardev`
    Chardev(String),
    /// `--export`
    Export(String),
    /// `--monitor`
    Monitor(String),
    /// `--nbd-server`
    NbdServer(String),
    /// `--object`
    Object(String),
    /// `--pidfile`
    PidFile(String),
    /// `--state-dir`
    StateDirectory(String),
    /// `--daemonize`
    Daemonize,
}

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Serve.
    Serve(Vec<Item>),
    /// Show the options.
    Help,
    /// Show the version.
    Version,
}

/// An option: its long name, and what makes an [`Item`] of its argument.
struct Spec {
    name: &'static str,
    short: Option<char>,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    With(fn(String) -> Item),
    Without(Item0),
}

/// Options without argument.
#[derive(Clone, Copy)]
enum Item0 {
    Daemonize,
    Help,
    Version,
}

const fn spec(name: &'static str, kind: Kind) -> Spec {
    Spec {
        name,
        short: None,
        kind,
    }
}

static SPECS: &[Spec] = &[
    spec("blockdev", Kind::With(Item::Blockdev)),
    spec("chardev", Kind::With(Item::Chardev)),
    spec("daemonize", Kind::Without(Item0::Daemonize)),
    spec("export", Kind::With(Item::Export)),
    Spec {
        name: "help",
        short: Some('h'),
        kind: Kind::Without(Item0::Help),
    },
    spec("monitor", Kind::With(Item::Monitor)),
    spec("nbd-server", Kind::With(Item::NbdServer)),
    spec("object", Kind::With(Item::Object)),
    spec("pidfile", Kind::With(Item::PidFile)),
    spec("state-dir", Kind::With(Item::StateDirectory)),
    Spec {
        name: "version",
        short: Some('V'),
        kind: Kind::Without(Item0::Version),
    },
];

impl Item {
    /// The option as messages name it: `--OPTION ARGUMENT`.
    pub fn place(&self) -> String {
        match self {
            Item::Blockdev(text) => format!("--blockdev {text}"),
            Item::Chardev(text) => format!("--chardev {text}"),
            Item::Export(text) => format!("--export {text}"),
            Item::Monitor(text) => format!("--monitor {text}"),
            Item::NbdServer(text) => format!("--nbd-server {text}"),
            Item::Object(text) => format!("--object {text}"),
            Item::PidFile(text) => format!("--pidfile {text}"),
            Item::StateDirectory(text) => format!("--state-dir {text}"),
            Item::Daemonize => "--daemonize".into(),
        }
    }
}

/// Reads the arguments after the program's name. Unique abbreviations of long options are understood.
///
/// # Errors
/// An unknown or ambiguous option, a missing or superfluous argument, a stray word.
pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Request, String> {
    let mut arguments = arguments.into_iter();
    let mut items = Vec::new();
    while let Some(word) = arguments.next() {
        let parsed = if word == "--" {
            match arguments.next() {
                Some(stray) => return Err(unexpected(&stray)),
                None => break,
            }
        } else if let Some(long) = word.strip_prefix("--") {
            parse_long(long, &mut arguments)?
        } else if let Some(letter) = word.strip_prefix('-').and_then(|rest| rest.chars().next()) {
            parse_short(letter)?
        } else {
            return Err(unexpected(&word));
        };
        match parsed {
            Parsed::Item(item) => items.push(item),
            Parsed::Without(Item0::Daemonize) => items.push(Item::Daemonize),
            Parsed::Without(Item0::Help) => return Ok(Request::Help),
            Parsed::Without(Item0::Version) => return Ok(Request::Version),
        }
    }
    Ok(Request::Serve(items))
}

enum Parsed {
    Item(Item),
    Without(Item0),
}

fn parse_long(text: &str, arguments: &mut impl Iterator<Item = String>) -> Result<Parsed, String> {
    let (name, attached) = match text.split_once('=') {
        Some((name, value)) => (name, Some(value.to_owned())),
        None => (text, None),
    };
    let spec = find_long(name)?;
    match (spec.kind, attached) {
        (Kind::With(item), attached) => match attached.or_else(|| arguments.next()) {
            Some(argument) => Ok(Parsed::Item(item(argument))),
            None => Err(format!("option '--{}' requires an argument", spec.name)),
        },
        (Kind::Without(_), Some(_)) => Err(format!(
            "option '--{}' doesn't allow an argument",
            spec.name
        )),
        (Kind::Without(item), None) => Ok(Parsed::Without(item)),
    }
}

fn find_long(name: &str) -> Result<&'static Spec, String> {
    if let Some(exact) = SPECS.iter().find(|spec| spec.name == name) {
        return Ok(exact);
    }
    let matching: Vec<&Spec> = SPECS
        .iter()
        .filter(|spec| spec.name.starts_with(name))
        .collect();
    match matching[..] {
        [] => Err(format!("unrecognized option '--{name}'")),
        [one] => Ok(one),
        _ => {
            let names = matching.iter().map(|spec| format!(" '--{}'", spec.name));
            let names: String = names.collect();
            Err(format!(
                "option '--{name}' is ambiguous; possibilities:{names}"
            ))
        }
    }
}

fn parse_short(letter: char) -> Result<Parsed, String> {
    let found = SPECS.iter().find(|spec| spec.short == Some(letter));
    match found.map(|spec| spec.kind) {
        Some(Kind::Without(item)) => Ok(Parsed::Without(item)),
        _ => Err(format!("invalid option -- '{letter}'")),
    }
}

fn unexpected(word: &str) -> String {
    format!("{word}: Unexpected argument")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Request, String> {
        super::parse(words.iter().map(|word| (*word).to_owned()))
    }

    #[test]
    fn options_keep_their_order() {
        let items = vec![
            Item::Blockdev("a".into()),
            Item::Daemonize,
            Item::Blockdev("b=c".into()),
            Item::PidFile("p".into()),
        ];
        let words = [
            "--blockdev",
            "a",
            "--daemonize",
            "--blockdev=b=c",
            "--pid",
            "p",
        ];
        assert_eq!(parse(&words), Ok(Request::Serve(items)));
        assert_eq!(parse(&["--vers"]), Ok(Request::Version));
        assert_eq!(parse(&["-Vx"]), Ok(Request::Version));
        assert_eq!(parse(&["-h"]), Ok(Request::Help));
    }

    /// Each was put to qemu-storage-daemon 10.0.2, which answered with these texts.
    #[test]
    fn errors_are_worded_as_qemu_words_them() {
        for (words, error) in [
            (&["--nosuch"][..], "unrecognized option '--nosuch'"),
            (&["--object"], "option '--object' requires an argument"),
            (&["--blo"], "option '--blockdev' requires an argument"),
            (
                &["--daemonize=3"],
                "option '--daemonize' doesn't allow an argument",
            ),
            (&["-x"], "invalid option -- 'x'"),
            (&["stray"], "stray: Unexpected argument"),
            (&["--", "stray"], "stray: Unexpected argument"),
        ] {
            assert_eq!(parse(words), Err(error.into()), "{words:?}");
        }
    }
}
