//! `key=value` lists with dotted keys, as the command line gives options; JSON where the text is an object.
//!
//! `parse` gives an object whose scalars are all strings; [`crate::qmp::schema::check`] converts them.
//! [`parse_option`] does both. The classic notation of `--chardev` is in [`super::chardev`].

use serde_json::{Map, Value};

use super::error::QmpError;
use super::json;
use super::schema::{Dialect, Object, check};

/// Longest fragment of a key, in bytes.
const FRAGMENT_MAX: usize = 127;

/// An option's argument as a checked, typed object.
///
/// `implied` is the key of a first value that is given without one.
///
/// # Errors
/// Wrong notation, or arguments that do not fit the schema.
pub fn parse_option(
    text: &str,
    implied: Option<&str>,
    options: &'static Object,
) -> Result<Value, QmpError> {
    if text.starts_with('{') {
        return check(options, json::parse(text)?, Dialect::Json);
    }
    let keyval = Keyval::parse(text, implied)?;
    if keyval.help {
        return Err(QmpError::generic("Help is not available for this option"));
    }
    check(options, Value::Object(keyval.members), Dialect::Keyval)
}

/// A parsed list.
#[derive(Debug)]
pub struct Keyval {
    /// The nested object, scalars as strings.
    pub members: Map<String, Value>,
    /// `help` or `?` stood in the list.
    pub help: bool,
}

impl Keyval {
    /// Parses a `key=value` list.
    ///
    /// # Errors
    /// A malformed key, a missing `=`, a key used both as scalar and as object, a gap in a list.
    pub fn parse(text: &str, implied: Option<&str>) -> Result<Keyval, QmpError> {
        let mut keyval = Keyval {
            members: Map::new(),
            help: false,
        };
        let mut rest = text;
        let mut implied = implied;
        while !rest.is_empty() {
            rest = keyval.pair(rest, implied.take())?;
        }
        keyval.members = match lists(keyval.members, &mut Vec::new())? {
            Value::Object(members) => members,
            _ => return Err(invalid(text)),
        };
        Ok(keyval)
    }

    /// Takes one pair and the comma after it; gives the rest.
    fn pair<'a>(&mut self, text: &'a str, implied: Option<&str>) -> Result<&'a str, QmpError> {
        let key_end = text.find(['=', ',']).unwrap_or(text.len());
        let has_value = text[key_end..].starts_with('=');
        if !has_value && matches!(&text[..key_end], "help" | "?") {
            self.help = true;
            return Ok(text[key_end..].trim_start_matches(','));
        }
        if let (Some(key), false) = (implied, has_value || key_end == 0) {
            let (value, rest) = take_value(text);
            self.insert(key, value)?;
            return Ok(rest);
        }
        let key = &text[..key_end];
        if !is_key(key)? {
            return Err(invalid(key));
        }
        if !has_value {
            let text = format!("Expected '=' after parameter '{key}'");
            return Err(QmpError::generic(text));
        }
        let (value, rest) = take_value(&text[key_end + 1..]);
        self.insert(key, value)?;
        Ok(rest)
    }

    fn insert(&mut self, key: &str, value: String) -> Result<(), QmpError> {
        let mut members = &mut self.members;
        let mut fragments = key.split('.').peekable();
        let mut length = 0;
        while let Some(fragment) = fragment_with_dots(&mut fragments, key, length) {
            let end = length + fragment.len();
            let inconsistent = || {
                QmpError::generic(format!(
                    "Parameters '{}.*' used inconsistently",
                    &key[..end]
                ))
            };
            let last = end == key.len();
            let present = members.get(fragment).map(Value::is_object);
            match (last, present) {
                (true, Some(true)) | (false, Some(false)) => return Err(inconsistent()),
                (true, _) => {
                    members.insert(fragment.into(), value.into());
                    return Ok(());
                }
                (false, _) => {
                    let next = members
                        .entry(fragment)
                        .or_insert_with(|| Value::Object(Map::new()));
                    match next {
                        Value::Object(inner) => members = inner,
                        _ => return Err(inconsistent()),
                    }
                }
            }
            length = end + 1;
        }
        Err(invalid(key))
    }
}

/// The next fragment of a key; one with an `__RFQDN_` prefix contains dots.
fn fragment_with_dots<'k>(
    fragments: &mut std::iter::Peekable<std::str::Split<'_, char>>,
    key: &'k str,
    start: usize,
) -> Option<&'k str> {
    let first = fragments.next()?;
    let mut end = start + first.len();
    if first.starts_with("__") {
        while !key[start + 2..end].contains('_') {
            end += 1 + fragments.next()?.len();
        }
    }
    Some(&key[start..end])
}

/// A value up to the next single comma, `,,` being a comma in it, and what follows that comma.
fn take_value(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        match rest.split_once(',') {
            None => {
                value.push_str(rest);
                return (value, "");
            }
            Some((before, after)) => {
                value.push_str(before);
                match after.strip_prefix(',') {
                    Some(more) => {
                        value.push(',');
                        rest = more;
                    }
                    None => return (value, after),
                }
            }
        }
    }
}

/// Whether a key is made of well-formed fragments.
fn is_key(key: &str) -> Result<bool, QmpError> {
    let mut rest = key;
    loop {
        let length = fragment_length(rest);
        if length == 0 {
            return Ok(false);
        }
        if length > FRAGMENT_MAX {
            let text = format!("Parameter '{}' is too long", &rest[..length]);
            return Err(QmpError::generic(text));
        }
        match rest[length..].strip_prefix('.') {
            Some(more) => rest = more,
            None => return Ok(length == rest.len()),
        }
    }
}

/// Length of the name or decimal number at the start of a key; 0 if there is neither.
fn fragment_length(text: &str) -> usize {
    if let Some(qualified) = text.strip_prefix("__") {
        let domain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        let domain = qualified.find(|c| !domain(c)).unwrap_or(qualified.len());
        return match qualified[domain..].strip_prefix('_') {
            Some(name) if domain > 0 && name_length(name) > 0 => 3 + domain + name_length(name),
            _ => 0,
        };
    }
    match text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len())
    {
        0 => name_length(text),
        digits => digits,
    }
}

fn name_length(text: &str) -> usize {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    match text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        true => text.find(|c| !part(c)).unwrap_or(text.len()),
        false => 0,
    }
}

/// Turns objects whose keys are numbers into arrays, at every depth below the top.
fn lists(members: Map<String, Value>, path: &mut Vec<String>) -> Result<Value, QmpError> {
    let mut converted = Map::new();
    for (key, value) in members {
        let value = match value {
            Value::Object(inner) => {
                path.push(key.clone());
                let inner = lists(inner, path)?;
                path.pop();
                inner
            }
            other => other,
        };
        converted.insert(key, value);
    }
    let numbered = converted
        .keys()
        .filter(|key| key.starts_with(|c: char| c.is_ascii_digit()));
    let prefix = path.join(".");
    match numbered.count() {
        0 => Ok(Value::Object(converted)),
        _ if path.is_empty() => Ok(Value::Object(converted)),
        count if count < converted.len() => {
            let text = format!("Parameters '{prefix}.*' used inconsistently");
            Err(QmpError::generic(text))
        }
        _ => list(converted, &prefix),
    }
}

fn list(mut members: Map<String, Value>, prefix: &str) -> Result<Value, QmpError> {
    (0..members.len())
        .map(|index| {
            let name = format!("{prefix}.{index}");
            let missing = || QmpError::generic(format!("Parameter '{name}' missing"));
            members.shift_remove(&index.to_string()).ok_or_else(missing)
        })
        .collect()
}

fn invalid(key: &str) -> QmpError {
    QmpError::generic(format!("Invalid parameter '{key}'"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qmp::schema::option;

    fn parse(text: &str) -> Result<Value, String> {
        Keyval::parse(text, Some("driver"))
            .map(|keyval| Value::Object(keyval.members))
            .map_err(|error| error.desc)
    }

    fn blockdev(text: &str) -> Result<Value, String> {
        parse_option(text, Some("driver"), &option::BLOCKDEV).map_err(|error| error.desc)
    }

    #[test]
    fn dots_nest_and_numbers_list() {
        assert_eq!(
            parse("qcow2,file.driver=file,file.filename=a,,b,l.1=y,l.0=x"),
            Ok(
                json!({"driver": "qcow2", "file": {"driver": "file", "filename": "a,b"}, "l": ["x", "y"]})
            )
        );
    }

    #[test]
    fn the_last_of_equal_keys_wins() {
        assert_eq!(parse("a=1,a=2"), Ok(json!({"a": "2"})));
    }

    /// Each was put to qemu-storage-daemon 10.0.2 as `--blockdev`, which answered with these texts.
    #[test]
    fn errors_are_worded_as_qemu_words_them() {
        for (text, error) in [
            ("=x", "Invalid parameter ''"),
            (",", "Invalid parameter ''"),
            ("driver.=x", "Invalid parameter 'driver.'"),
            (".a=b", "Invalid parameter '.a'"),
            ("1a=b", "Invalid parameter '1a'"),
            ("a b=c", "Invalid parameter 'a b'"),
            ("a-b.c d=3", "Invalid parameter 'a-b.c d'"),
            ("n=1,-x=a", "Invalid parameter '-x'"),
            ("n=1,__org.foo_=a", "Invalid parameter '__org.foo_'"),
            ("n=1,node-name", "Expected '=' after parameter 'node-name'"),
            ("c=x,c.d=on", "Parameters 'c.*' used inconsistently"),
            ("c.d=on,c=x", "Parameters 'c.*' used inconsistently"),
            ("b.0=x,b.a=3", "Parameters 'b.*' used inconsistently"),
            ("b.1=x", "Parameter 'b.0' missing"),
            ("b.0=x,b.2=y", "Parameter 'b.1' missing"),
            ("b.01=x", "Parameter 'b.0' missing"),
        ] {
            assert_eq!(parse(text), Err(error.into()), "{text}");
        }
        let long = "a".repeat(128);
        let error = format!("Parameter '{long}' is too long");
        assert_eq!(parse(&format!("{long}=3")), Err(error));
    }

    #[test]
    fn qualified_names_may_contain_dots() {
        assert_eq!(
            parse("n=1,__org.foo_a.b=c"),
            Ok(json!({"n": "1", "__org.foo_a": {"b": "c"}}))
        );
    }

    #[test]
    fn strings_become_what_the_schema_says() {
        assert_eq!(
            blockdev("null-co,node-name=n,size=0x10,read-zeroes=on,cache.direct=off"),
            Ok(
                json!({"driver": "null-co", "node-name": "n", "cache": {"direct": false}, "size": 16, "read-zeroes": true})
            )
        );
    }

    /// Each was put to qemu-storage-daemon 10.0.2, which answered with these texts.
    #[test]
    fn conversions_fail_as_in_qemu() {
        let (boolean, integer) = ("expects 'on' or 'off'", "expects integer");
        for (text, error) in [
            ("read-only=", format!("Parameter 'read-only' {boolean}")),
            (
                "read-zeroes=TRUE",
                format!("Parameter 'read-zeroes' {boolean}"),
            ),
            ("size=", format!("Parameter 'size' {integer}")),
            ("size=1M", format!("Parameter 'size' {integer}")),
            ("size=-1x", format!("Parameter 'size' {integer}")),
            ("size=5.0", format!("Parameter 'size' {integer}")),
            (
                "size=9223372036854775808",
                format!("Parameter 'size' {integer}"),
            ),
            (
                "latency-ns=18446744073709551616",
                format!("Parameter 'latency-ns' {integer}"),
            ),
            (
                "cache=x",
                "Invalid parameter type for 'cache', expected: object".into(),
            ),
            (
                "cache.0=on",
                "Invalid parameter type for 'cache', expected: object".into(),
            ),
            (
                "cache.direct.x=on",
                "Parameters 'cache.direct.*' are unexpected".into(),
            ),
            (
                "node-name.0=n",
                "Parameters 'node-name.*' are unexpected".into(),
            ),
            (
                "detect-zeroes=x",
                "Parameter 'detect-zeroes' does not accept value 'x'".into(),
            ),
            (
                "__org.foo_a.b=a",
                "Parameter '__org.foo_a' is unexpected".into(),
            ),
            ("help", "Help is not available for this option".into()),
        ] {
            assert_eq!(blockdev(&format!("null-co,{text}")), Err(error), "{text}");
        }
        for text in [
            "size=010",
            "size= 5",
            "size=+5",
            "read-only=yes",
            "latency-ns=-1",
        ] {
            assert!(blockdev(&format!("null-co,{text}")).is_ok(), "{text}");
        }
    }

    #[test]
    fn json_is_told_by_its_brace() {
        assert_eq!(
            blockdev("{'driver': 'null-co', 'size': 1}"),
            Ok(json!({"driver": "null-co", "size": 1}))
        );
        assert_eq!(blockdev("{"), Err("JSON parse error, premature EOI".into()));
        let error = "Parameter 'driver' does not accept value '[1]'";
        assert_eq!(blockdev("[1]"), Err(error.into()));
    }

    #[test]
    fn paths_of_list_elements_use_dots() {
        let export =
            |text| parse_option(text, Some("type"), &option::EXPORT).map_err(|error| error.desc);
        assert_eq!(
            export("nbd,id=e,node-name=n,bitmaps.0.node=x"),
            Err("Parameter 'bitmaps.0.name' is missing".into())
        );
        assert_eq!(
            export("nbd,id=e,node-name=n,bitmaps=x"),
            Err("Invalid parameter type for 'bitmaps', expected: array".into())
        );
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[a-b0-1_.,=?{} ]{0,40}", implied in proptest::bool::ANY) {
            let _ = Keyval::parse(&text, implied.then_some("driver"));
            let _ = blockdev(&text);
        }
    }
}
