//! The tree of options that a node is described with, before it is given meaning.

use crate::error::{Error, ErrorKind, Result};

use super::blkdebug_description::RuleReader;

/// A value in a tree of options: what JSON and dotted keys have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Explicitly nothing (`"backing": null`).
    Null,
    /// True or false.
    Bool(bool),
    /// A number without fraction.
    Int(i128),
    /// Text.
    Str(String),
    /// Values in order.
    List(Vec<Value>),
    /// Named values; each name once.
    Map(Vec<(String, Value)>),
}

impl Value {
    /// A map of these entries.
    pub fn map<const N: usize>(entries: [(&str, Value); N]) -> Value {
        let own = |(name, value): (&str, Value)| (name.to_owned(), value);
        Value::Map(entries.into_iter().map(own).collect())
    }

    /// Text.
    pub fn str(text: impl Into<String>) -> Value {
        Value::Str(text.into())
    }
}

/// Takes the entries of a map one by one; what is left at the end is not supported.
pub(super) struct Reader {
    entries: Vec<(String, Value)>,
    /// Path of the map, for messages: empty or ending in a dot.
    path: String,
}

impl Reader {
    pub(super) fn new(value: Value, path: &str) -> Result<Reader> {
        match value {
            Value::Map(entries) => Ok(Reader {
                entries,
                path: path.to_owned(),
            }),
            _ => Err(wrong_type(path.trim_end_matches('.'), "object")),
        }
    }

    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        let index = self.entries.iter().position(|(key, _)| key == name)?;
        Some(self.entries.remove(index).1)
    }

    pub(super) fn path_of(&self, name: &str) -> String {
        format!("{}{name}", self.path)
    }

    pub(super) fn string(&mut self, name: &str) -> Result<Option<String>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Str(text)) => Ok(Some(text)),
            Some(_) => Err(wrong_type(&self.path_of(name), "string")),
        }
    }

    pub(super) fn required_string(&mut self, name: &str) -> Result<String> {
        let text = self.string(name)?;
        text.ok_or_else(|| self.missing(name))
    }

    pub(super) fn bool(&mut self, name: &str) -> Result<Option<bool>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(wrong_type(&self.path_of(name), "boolean")),
        }
    }

    /// A size or count: not negative.
    pub(super) fn unsigned(&mut self, name: &str) -> Result<Option<u64>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Int(value)) => match u64::try_from(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(invalid(format!(
                    "Parameter '{name}' expects a non-negative value"
                ))),
            },
            Some(_) => Err(wrong_type(&self.path_of(name), "integer")),
        }
    }

    /// A number of any sign.
    pub(super) fn int(&mut self, name: &str) -> Result<Option<i128>> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Int(value)) => Ok(Some(value)),
            Some(_) => Err(wrong_type(&self.path_of(name), "integer")),
        }
    }

    fn list(&mut self, name: &str) -> Result<Vec<Value>> {
        match self.take(name) {
            None => Ok(Vec::new()),
            Some(Value::List(values)) => Ok(values),
            Some(_) => Err(wrong_type(&self.path_of(name), "array")),
        }
    }

    /// The maps of a list, each to be read as a rule.
    pub(super) fn maps(&mut self, name: &str) -> Result<Vec<RuleReader>> {
        let path = self.path_of(name);
        let values = self.list(name)?.into_iter().enumerate();
        values
            .map(|(index, value)| RuleReader::typed(value, &format!("{path}[{index}].")))
            .collect()
    }

    /// Words of a list, each one of a few.
    pub(super) fn words<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<Vec<T>> {
        let meaning = |value: Value| {
            let known = words
                .iter()
                .find(|(word, _)| matches!(&value, Value::Str(text) if text == word));
            known.map(|(_, meaning)| *meaning).ok_or_else(|| {
                invalid(format!(
                    "Parameter '{name}' does not accept value '{value:?}'"
                ))
            })
        };
        self.list(name)?.into_iter().map(meaning).collect()
    }

    /// The name of the first entry that nobody took.
    pub(super) fn first_left(&self) -> Option<&str> {
        self.entries.first().map(|(name, _)| name.as_str())
    }

    /// One of a few words.
    pub(super) fn word<T: Copy>(&mut self, name: &str, words: &[(&str, T)]) -> Result<Option<T>> {
        let Some(text) = self.string(name)? else {
            return Ok(None);
        };
        match words.iter().find(|(word, _)| *word == text) {
            Some((_, meaning)) => Ok(Some(*meaning)),
            None => Err(invalid(format!(
                "Parameter '{name}' does not accept value '{text}'"
            ))),
        }
    }

    /// The map under this name.
    pub(super) fn map(&mut self, name: &str) -> Result<Option<Reader>> {
        let path = format!("{}.", self.path_of(name));
        self.take(name)
            .map(|value| Reader::new(value, &path))
            .transpose()
    }

    pub(super) fn missing(&self, name: &str) -> Error {
        invalid(format!("Parameter '{}' is missing", self.path_of(name)))
    }

    /// Everything was taken.
    ///
    /// # Errors
    /// Names the first option that nobody took.
    pub(super) fn finish(self, driver: &str) -> Result<()> {
        match self.entries.first() {
            None => Ok(()),
            Some((name, _)) => Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "Option '{}{name}' of driver '{driver}' is not supported",
                    self.path
                ),
            )),
        }
    }
}

pub(super) fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

fn wrong_type(path: &str, expected: &str) -> Error {
    invalid(format!(
        "Invalid parameter type for '{path}', expected: {expected}"
    ))
}
