//! JSON as a QMP monitor reads and writes it.
//!
//! [`Reader`] takes bytes in any chunks and gives values: it accepts single quotes, needs no separator
//! between messages, and finds its way back after garbage. [`parse`] reads one value that must be all of
//! a text (the command line). [`write`](fn@write) makes a line, or pretty lines, of a value.
//! Nothing here knows what a request is.

mod lexer;
mod parser;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use serde_json::Value;

use lexer::{Kind, Lexer, Token};
pub use writer::{Style, write};

/// What was wrong with the input, in QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JsonError(pub String);

/// Bounds on one message.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of all tokens together.
    pub token_bytes: usize,
    /// Number of tokens.
    pub tokens: usize,
    /// Open braces and brackets.
    pub nesting: usize,
}

impl Default for Limits {
    /// QEMU's bounds.
    fn default() -> Limits {
        Limits {
            token_bytes: 64 << 20,
            tokens: 2 << 20,
            nesting: 1024,
        }
    }
}

/// Reads messages from a stream of bytes.
#[derive(Debug, Default)]
pub struct Reader {
    lexer: Lexer,
    message: Message,
    done: VecDeque<Result<Value, JsonError>>,
}

impl Reader {
    /// A reader with bounds of its own.
    pub fn with_limits(limits: Limits) -> Reader {
        Reader {
            message: Message {
                limits,
                ..Message::default()
            },
            ..Reader::default()
        }
    }

    /// Takes bytes; messages that became complete wait for [`Reader::next_message`].
    pub fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            let (message, done) = (&mut self.message, &mut self.done);
            self.lexer
                .feed(*byte, |token| done.extend(message.push(token)));
            if self.message.overflows_with(self.lexer.pending()) {
                self.lexer.abandon();
                self.done
                    .push_back(Err(self.message.refuse("JSON token size limit exceeded")));
            }
        }
    }

    /// The input has ended: an unfinished message is an error.
    pub fn end(&mut self) {
        let (message, done) = (&mut self.message, &mut self.done);
        self.lexer.end(|token| done.extend(message.push(token)));
        self.done.extend(self.message.end());
    }

    /// The oldest complete message that was not taken yet.
    pub fn next_message(&mut self) -> Option<Result<Value, JsonError>> {
        self.done.pop_front()
    }

    /// Number of complete messages that were not taken yet.
    pub fn waiting(&self) -> usize {
        self.done.len()
    }
}

/// Parses a text that must be exactly one value.
///
/// # Errors
/// The text is no JSON, is empty, or holds more than one value.
pub fn parse(text: &str) -> Result<Value, JsonError> {
    let mut reader = Reader::default();
    reader.feed(text.as_bytes());
    reader.end();
    let value = match reader.next_message() {
        Some(result) => result?,
        None => return Err(JsonError("Expecting a JSON value".into())),
    };
    match reader.next_message() {
        None => Ok(value),
        Some(_) => Err(JsonError("Expecting at most one JSON value".into())),
    }
}

/// The tokens of the message that is being read.
#[derive(Debug, Default)]
struct Message {
    limits: Limits,
    tokens: Vec<Token>,
    token_bytes: usize,
    braces: isize,
    brackets: isize,
}

impl Message {
    /// Adds a token; a message that is complete, or that went wrong, comes out.
    fn push(&mut self, token: Token) -> Option<Result<Value, JsonError>> {
        match token.kind {
            Kind::OpenBrace => self.braces += 1,
            Kind::CloseBrace => self.braces -= 1,
            Kind::OpenBracket => self.brackets += 1,
            Kind::CloseBracket => self.brackets -= 1,
            Kind::Stray => return Some(Err(self.refuse(stray(&token.text)))),
            _ => {}
        }
        if self.overflows_with(token.text.len()) {
            return Some(Err(self.refuse("JSON token size limit exceeded")));
        }
        if self.tokens.len() >= self.limits.tokens {
            return Some(Err(self.refuse("JSON token count limit exceeded")));
        }
        if self.braces + self.brackets > self.limits.nesting as isize {
            return Some(Err(self.refuse("JSON nesting depth limit exceeded")));
        }
        self.token_bytes += token.text.len();
        self.tokens.push(token);
        let open = self.braces > 0 || self.brackets > 0;
        if open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        Some(self.complete())
    }

    fn end(&mut self) -> Option<Result<Value, JsonError>> {
        (!self.tokens.is_empty()).then(|| self.complete())
    }

    fn complete(&mut self) -> Result<Value, JsonError> {
        let result = parser::parse(&self.tokens);
        self.clear();
        result
    }

    fn overflows_with(&self, bytes: usize) -> bool {
        self.token_bytes + bytes > self.limits.token_bytes
    }

    fn refuse(&mut self, text: impl Into<String>) -> JsonError {
        self.clear();
        JsonError(text.into())
    }

    fn clear(&mut self) {
        *self = Message {
            limits: self.limits,
            ..Message::default()
        };
    }
}

/// As in C, a NUL ends the text that is shown.
fn stray(text: &[u8]) -> String {
    let shown = text.split(|byte| *byte == 0).next().unwrap_or_default();
    parser::parse_error(format_args!("stray '{}'", String::from_utf8_lossy(shown))).0
}
