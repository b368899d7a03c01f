//! Values to bytes: one line, or pretty; ASCII only, line breaks are CR LF.

use std::fmt::Write as _;

use serde_json::Value;

/// How a message is laid out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// All on one line.
    #[default]
    Line,
    /// Members and elements on lines of their own, four blanks deeper than what holds them.
    Pretty,
}

/// One message, ended by CR LF.
pub fn write(value: &Value, style: Style) -> Vec<u8> {
    let mut writer = Writer {
        out: String::new(),
        style,
        depth: 0,
    };
    writer.value(value);
    writer.out.push_str("\r\n");
    writer.out.into_bytes()
}

struct Writer {
    out: String,
    style: Style,
    depth: usize,
}

impl Writer {
    fn value(&mut self, value: &Value) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(true) => self.out.push_str("true"),
            Value::Bool(false) => self.out.push_str("false"),
            Value::Number(number) => self.out.push_str(&number.to_string()),
            Value::String(text) => self.string(text),
            Value::Array(array) => self.list('[', ']', array, |writer, item| writer.value(item)),
            Value::Object(object) => self.list('{', '}', object, |writer, (name, member)| {
                writer.string(name);
                writer.out.push_str(": ");
                writer.value(member);
            }),
        }
    }

    fn list<T>(
        &mut self,
        open: char,
        close: char,
        items: impl IntoIterator<Item = T>,
        mut write: impl FnMut(&mut Writer, T),
    ) {
        self.out.push(open);
        self.depth += 1;
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.out.push(',');
            }
            self.separate(index > 0);
            write(self, item);
        }
        self.depth -= 1;
        self.separate(false);
        self.out.push(close);
    }

    fn separate(&mut self, between: bool) {
        match self.style {
            Style::Line if between => self.out.push(' '),
            Style::Line => {}
            Style::Pretty => {
                self.out.push_str("\r\n");
                self.out.extend(std::iter::repeat_n("    ", self.depth));
            }
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            self.character(character);
        }
        self.out.push('"');
    }

    fn character(&mut self, character: char) {
        match character {
            '"' => self.out.push_str("\\\""),
            '\\' => self.out.push_str("\\\\"),
            '\u{8}' => self.out.push_str("\\b"),
            '\u{c}' => self.out.push_str("\\f"),
            '\n' => self.out.push_str("\\n"),
            '\r' => self.out.push_str("\\r"),
            '\t' => self.out.push_str("\\t"),
            ' '..='~' => self.out.push(character),
            other => {
                for unit in other.encode_utf16(&mut [0; 2]) {
                    // Writing to a String does not fail.
                    let _ = write!(self.out, "\\u{unit:04X}");
                }
            }
        }
    }
}
