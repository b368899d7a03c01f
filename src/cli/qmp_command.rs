//! `liveblk qmp`: one command, its arguments typed by the schema.

use serde_json::{Map, Value};

use crate::error::{Error, ErrorKind, Result};
use crate::qmp::json;
use crate::qmp::keyval::Keyval;
use crate::qmp::schema::{self, Dialect};

use super::args::QmpArguments;
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint};

pub(super) fn run(arguments: &QmpArguments) -> Result<Outcome> {
    let object = object(&arguments.command, &arguments.arguments)?;
    let mut client = QmpClient::connect(&endpoint::find(&arguments.endpoint)?)?;
    let result = client.execute(&arguments.command, object)?;
    Ok(Outcome::text(format!("{result:#}\n")))
}

/// The command's arguments. JSON goes to the daemon as it is; words need a command that we know.
fn object(command: &str, words: &[String]) -> Result<Map<String, Value>> {
    let value = match words {
        [] => return Ok(Map::new()),
        [text] if text.starts_with('{') => json::parse(text).map_err(|error| wrong(&error.0))?,
        words => typed(command, words)?,
    };
    match value {
        Value::Object(members) => Ok(members),
        _ => Err(wrong("the arguments are not an object")),
    }
}

fn typed(command: &str, words: &[String]) -> Result<Value> {
    let schema = schema::command(command).ok_or_else(|| {
        let text = "is not known here, so its arguments must be given as one JSON object";
        wrong(&format!("the command '{command}' {text}"))
    })?;
    let escaped: Vec<String> = words.iter().map(|word| word.replace(',', ",,")).collect();
    let keyval = Keyval::parse(&escaped.join(","), None).map_err(|error| wrong(&error.desc))?;
    if keyval.help {
        return Err(wrong(
            "'help' is no argument; see 'liveblk qmp query-qmp-schema'",
        ));
    }
    let members = Value::Object(keyval.members);
    schema::check(schema.args, members, Dialect::Keyval).map_err(|error| wrong(&error.desc))
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidArgument, what)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn arguments(command: &str, words: &[&str]) -> Result<Value, String> {
        let words: Vec<String> = words.iter().map(|word| word.to_string()).collect();
        object(command, &words)
            .map(Value::Object)
            .map_err(|error| error.message().to_string())
    }

    #[test]
    fn words_are_typed_by_the_schema_and_nest_by_dots() {
        let words = [
            "driver=raw",
            "node-name=123",
            "read-only=on",
            "offset=512",
            "file.driver=file",
            "file.filename=a,b",
        ];
        let wanted = json!({
            "driver": "raw", "node-name": "123", "read-only": true, "offset": 512,
            "file": {"driver": "file", "filename": "a,b"},
        });
        let given = arguments("blockdev-add", &words).unwrap();
        assert_eq!(sorted(given), sorted(wanted));
    }

    fn sorted(mut value: Value) -> Value {
        value.sort_all_objects();
        value
    }

    #[test]
    fn json_goes_through_whatever_the_command() {
        let text = "{\"a\": [1, null]}";
        assert_eq!(arguments("x-new", &[text]), Ok(json!({"a": [1, null]})));
        assert_eq!(arguments("x-new", &[]), Ok(json!({})));
    }

    #[test]
    fn what_cannot_be_an_argument_is_refused_before_connecting() {
        assert!(
            arguments("x-new", &["a=1"])
                .unwrap_err()
                .contains("not known here")
        );
        assert!(arguments("quit", &["a=1"]).unwrap_err().contains("'a'"));
        assert!(
            arguments("blockdev-add", &["{"])
                .unwrap_err()
                .contains("JSON")
        );
        let error = arguments("block_resize", &["node-name=n", "size=many"]).unwrap_err();
        assert!(error.contains("'size'"), "{error}");
    }
}
