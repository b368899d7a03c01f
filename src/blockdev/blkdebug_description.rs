//! `blkdebug` as somebody describes it: its own options, and rules from them and from a file.

use nix::errno::Errno;

use crate::block::{DEBUG_EVENTS, DebugEvent, Permission};
use crate::error::{Error, ErrorKind, Result, strerror};
use crate::filter::{BlkdebugOptions, InjectError, IoTypes, SetState};
use crate::runtime::Handle;

use super::value::{Reader, Value, invalid};

const IO_TYPES: &[(&str, IoTypes)] = &[
    ("read", IoTypes::READ),
    ("write", IoTypes::WRITE),
    ("write-zeroes", IoTypes::WRITE_ZEROES),
    ("discard", IoTypes::DISCARD),
    ("flush", IoTypes::FLUSH),
    ("block-status", IoTypes::BLOCK_STATUS),
];

const PERMISSIONS: &[(&str, Permission)] = &[
    ("consistent-read", Permission::CONSISTENT_READ),
    ("write", Permission::WRITE),
    ("write-unchanged", Permission::WRITE_UNCHANGED),
    ("resize", Permission::RESIZE),
];

/// Sizes, each with its place.
type Size = (&'static str, fn(&mut BlkdebugOptions) -> &mut u64);
const SIZES: &[Size] = &[
    ("align", |options| &mut options.align),
    ("max-transfer", |options| &mut options.max_transfer),
    ("opt-write-zero", |options| &mut options.opt_write_zero),
    ("max-write-zero", |options| &mut options.max_write_zero),
    ("opt-discard", |options| &mut options.opt_discard),
    ("max-discard", |options| &mut options.max_discard),
];

/// Everything but the child.
#[derive(Clone, Debug, Default)]
pub struct BlkdebugDescription {
    /// The file with more rules.
    pub config: Option<String>,
    /// Rules and sizes that were given in place.
    inline: BlkdebugOptions,
    /// What was given, in dotted keys, for the node's file name.
    given: Vec<(String, Value)>,
}

impl BlkdebugDescription {
    pub(super) fn parse(reader: &mut Reader) -> Result<BlkdebugDescription> {
        let mut description = BlkdebugDescription {
            config: reader.string("config")?,
            ..BlkdebugDescription::default()
        };
        for (name, place) in SIZES {
            let Some(value) = reader.int(name)? else {
                continue;
            };
            let fits = i32::try_from(value).ok().is_some();
            let size = u64::try_from(value)
                .ok()
                .filter(|_| fits || *name == "align");
            let size =
                size.ok_or_else(|| invalid(format!("Parameter '{name}' expects int32_t")))?;
            *place(&mut description.inline) = size;
            description.note(name, Value::Int(value));
        }
        for (index, mut rule) in reader.maps("inject-error")?.into_iter().enumerate() {
            let parsed = inject_error(&mut rule)?;
            description.note_rule("inject-error", index, rule)?;
            description.inline.inject_error.push(parsed);
        }
        for (index, mut rule) in reader.maps("set-state")?.into_iter().enumerate() {
            let parsed = set_state(&mut rule)?;
            description.note_rule("set-state", index, rule)?;
            description.inline.set_state.push(parsed);
        }
        description.inline.take = permissions(reader, "take-child-perms")?;
        description.inline.unshare = permissions(reader, "unshare-child-perms")?;
        Ok(description)
    }

    fn note(&mut self, key: &str, value: Value) {
        self.given.push((key.to_owned(), value));
    }

    fn note_rule(&mut self, list: &str, index: usize, rule: RuleReader) -> Result<()> {
        for (key, value) in rule.finish()? {
            self.note(&format!("{list}.{index}.{key}"), value);
        }
        Ok(())
    }

    /// What was given besides the file and the child, in dotted keys.
    pub(super) fn given(&self) -> &[(String, Value)] {
        &self.given
    }

    /// The first option in which another description differs.
    pub(super) fn difference(&self, other: &BlkdebugDescription) -> Option<String> {
        if self.config != other.config {
            return Some("config".to_owned());
        }
        let missing = |one: &[(String, Value)], two: &[(String, Value)]| {
            let lost = one.iter().find(|given| !two.contains(given));
            lost.map(|(key, _)| key.clone())
        };
        missing(&other.given, &self.given)
            .or_else(|| missing(&self.given, &other.given))
            .or_else(|| {
                (self.inline.take != other.inline.take).then(|| "take-child-perms".to_owned())
            })
            .or_else(|| {
                (self.inline.unshare != other.inline.unshare)
                    .then(|| "unshare-child-perms".to_owned())
            })
    }

    /// All rules, those of the file first.
    ///
    /// # Errors
    /// The file cannot be read or is not well-formed, in QEMU's words.
    pub(super) async fn options(&self, handle: &Handle) -> Result<BlkdebugOptions> {
        let Some(config) = self.config.clone() else {
            return Ok(self.inline.clone());
        };
        let read = handle.blocking(move || std::fs::read(config)).await;
        let bytes = read.map_err(|error| {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(Errno::EIO as i32));
            let text = format!("Could not read blkdebug config file: {}", strerror(errno));
            Error::from_errno(errno, text)
        })?;
        let mut options = self.inline.clone();
        let (errors, changes) = parse_config(&String::from_utf8_lossy(&bytes))?;
        options.inject_error.splice(0..0, errors);
        options.set_state.splice(0..0, changes);
        Ok(options)
    }
}

fn permissions(reader: &mut Reader, name: &str) -> Result<Permission> {
    let words = reader.words(name, PERMISSIONS)?;
    Ok(words
        .into_iter()
        .fold(Permission::empty(), |all, one| all | one))
}

/// The options of one rule, typed or as text.
pub(super) struct RuleReader {
    reader: Reader,
    given: Vec<(String, Value)>,
    /// From a file: every value is text, and messages are others.
    is_text: bool,
}

impl RuleReader {
    pub(super) fn typed(value: Value, path: &str) -> Result<RuleReader> {
        Ok(RuleReader {
            reader: Reader::new(value, path)?,
            given: Vec::new(),
            is_text: false,
        })
    }

    fn text(entries: Vec<(String, Value)>) -> Result<RuleReader> {
        Ok(RuleReader {
            reader: Reader::new(Value::Map(entries), "")?,
            given: Vec::new(),
            is_text: true,
        })
    }

    fn take(&mut self, name: &str) -> Option<Value> {
        let value = self.reader.take(name)?;
        self.given.push((name.to_owned(), value.clone()));
        Some(value)
    }

    fn number(&mut self, name: &str) -> Result<Option<i64>> {
        let value = match self.take(name) {
            None => return Ok(None),
            Some(Value::Int(value)) => i64::try_from(value).ok(),
            Some(Value::Str(text)) if self.is_text => parse_number(&text),
            Some(_) => None,
        };
        value
            .map(Some)
            .ok_or_else(|| invalid(format!("Parameter '{name}' expects a number")))
    }

    fn bool(&mut self, name: &str) -> Result<bool> {
        match self.take(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(value),
            Some(Value::Str(text)) if text == "on" => Ok(true),
            Some(Value::Str(text)) if text == "off" => Ok(false),
            Some(_) => Err(invalid(format!("Parameter '{name}' expects 'on' or 'off'"))),
        }
    }

    fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<Option<T>> {
        let text = match self.take(name) {
            None => return Ok(None),
            Some(Value::Str(text)) => text,
            Some(_) => String::new(),
        };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => Err(invalid(format!("invalid parameter value: {text}"))),
        }
    }

    fn event(&mut self) -> Result<DebugEvent> {
        let event = self.word("event", &DEBUG_EVENTS)?;
        event.ok_or_else(missing_event)?.ok_or_else(|| {
            let name = match self.given.last() {
                Some((_, Value::Str(name))) => name.as_str(),
                _ => "",
            };
            let message = format!("The event '{name}' does not happen in liveblk");
            Error::new(ErrorKind::Unsupported, message)
        })
    }

    fn finish(self) -> Result<Vec<(String, Value)>> {
        match self.reader.first_left() {
            Some(name) => Err(invalid(format!("Invalid parameter '{name}'"))),
            None => Ok(self.given),
        }
    }
}

/// Decimal, octal (`0…`) or hexadecimal (`0x…`).
fn parse_number(text: &str) -> Option<i64> {
    let (sign, digits) = match text.strip_prefix('-') {
        Some(rest) => (-1, rest),
        None => (1, text),
    };
    let value = match digits.strip_prefix("0x") {
        Some(digits) => i64::from_str_radix(digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => i64::from_str_radix(digits, 8),
        None => digits.parse(),
    };
    Some(sign * value.ok()?)
}

fn inject_error(rule: &mut RuleReader) -> Result<InjectError> {
    let event = rule.event()?;
    let state = rule.number("state")?.unwrap_or(0);
    let requests = rule.word("iotype", IO_TYPES)?.unwrap_or_default();
    let errno = match rule.number("errno")?.unwrap_or(Errno::EIO as i64) {
        0 => None,
        number => match i32::try_from(number).map(Errno::from_raw) {
            Ok(errno) if errno != Errno::UnknownErrno => Some(errno),
            _ => return Err(invalid(format!("There is no error of number {number}"))),
        },
    };
    let sector = match rule.number("sector")?.unwrap_or(-1) {
        -1 => None,
        sector => Some(
            u64::try_from(sector)
                .map_err(|_| invalid("Parameter 'sector' expects a non-negative value"))?,
        ),
    };
    Ok(InjectError {
        event,
        state,
        requests,
        errno,
        sector,
        once: rule.bool("once")?,
        immediately: rule.bool("immediately")?,
    })
}

fn set_state(rule: &mut RuleReader) -> Result<SetState> {
    let event = rule.event()?;
    Ok(SetState {
        event,
        state: rule.number("state")?.unwrap_or(0),
        new_state: rule.number("new_state")?.unwrap_or(0),
    })
}

fn missing_event() -> Error {
    invalid("Missing event name for rule")
}

/// Sections `[inject-error]` and `[set-state]` of lines `name = "value"`.
fn parse_config(text: &str) -> Result<(Vec<InjectError>, Vec<SetState>)> {
    let mut sections: Vec<(String, Vec<(String, Value)>)> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(head) = line.strip_prefix('[') {
            let name = head.split([']', ' ']).next().unwrap_or_default();
            if !["inject-error", "set-state"].contains(&name) {
                return Err(invalid(format!("There is no option group '{name}'")));
            }
            sections.push((name.to_owned(), Vec::new()));
            continue;
        }
        let Some((_, entries)) = sections.last_mut() else {
            return Err(invalid("no group defined"));
        };
        let Some((name, value)) = line.split_once('=') else {
            return Err(invalid("parse error"));
        };
        // What is not quoted is no value, as in QEMU.
        let value = value
            .trim()
            .strip_prefix('"')
            .and_then(|value| value.split('"').next());
        let value = Value::str(value.unwrap_or_default());
        entries.push((name.trim().to_owned(), value));
    }
    let (mut errors, mut changes) = (Vec::new(), Vec::new());
    for (name, entries) in sections {
        let mut rule = RuleReader::text(entries)?;
        if name == "set-state" {
            changes.push(set_state(&mut rule)?);
        } else {
            errors.push(inject_error(&mut rule)?);
        }
        rule.finish()?;
    }
    Ok((errors, changes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        match parse_config(text) {
            Ok(rules) => panic!("{rules:?}"),
            Err(error) => error.message().to_owned(),
        }
    }

    /// Each text as qemu-storage-daemon 10.0.2 has it.
    #[test]
    fn config_files_are_refused_in_qemus_words() {
        let with = |line: &str| format!("[inject-error]\nevent = \"read_aio\"\n{line}\n");
        let cases = [
            ("garbage\n".to_owned(), "no group defined"),
            (
                "[foo]\nevent = \"read_aio\"\n".into(),
                "There is no option group 'foo'",
            ),
            (
                "[inject-error]\nerrno = \"5\"\n".into(),
                "Missing event name for rule",
            ),
            (
                "[inject-error]\nevent = \"no\"\n".into(),
                "invalid parameter value: no",
            ),
            (
                "[inject-error]\nevent = read_aio\n".into(),
                "invalid parameter value: ",
            ),
            (with("bogus = \"1\""), "Invalid parameter 'bogus'"),
            (
                with("errno = \"abc\""),
                "Parameter 'errno' expects a number",
            ),
            (
                with("once = \"maybe\""),
                "Parameter 'once' expects 'on' or 'off'",
            ),
            (with("iotype = \"foo\""), "invalid parameter value: foo"),
        ];
        for (text, expected) in cases {
            assert_eq!(refusal(&text), expected, "{text}");
        }
    }

    #[test]
    fn config_files_have_rules() {
        let text = "# a comment\n\n[inject-error \"x\"]\n  event = \"write_aio\"\nerrno=\"0x1c\"\n\
                    sector = \"3\"\nonce = \"on\"\n[set-state]\nevent = \"read_aio\"\n\
                    new_state = \"010\"\n";
        let (errors, changes) = parse_config(text).expect("valid");
        assert_eq!(errors[0].errno, Some(Errno::ENOSPC));
        assert_eq!(errors[0].sector, Some(3));
        assert!(errors[0].once && !errors[0].immediately);
        assert_eq!(changes[0].new_state, 8);
    }

    #[test]
    fn events_of_others_are_refused_by_name() {
        let text = refusal("[inject-error]\nevent = \"vmstate_load\"\n");
        assert_eq!(text, "The event 'vmstate_load' does not happen in liveblk");
    }
}
