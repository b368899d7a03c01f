//! The tokens of one message to a value, with QEMU's error texts.

use serde_json::{Map, Number, Value};

use super::JsonError;
use super::lexer::{Kind, Token};

/// Parses the tokens of one message; the first token begins the value.
pub(super) fn parse(tokens: &[Token]) -> Result<Value, JsonError> {
    Parser { tokens, next: 0 }.value()
}

/// Recursion is bounded by the reader's nesting limit.
struct Parser<'a> {
    tokens: &'a [Token],
    next: usize,
}

impl<'a> Parser<'a> {
    fn value(&mut self) -> Result<Value, JsonError> {
        let token = self.take()?;
        match token.kind {
            Kind::OpenBrace => self.object(),
            Kind::OpenBracket => self.array(),
            Kind::String => unquote(&token.text).map(Value::String),
            Kind::Integer | Kind::Float => number(&token.text),
            Kind::Keyword => keyword(&token.text),
            _ => Err(parse_error("expecting value")),
        }
    }

    fn object(&mut self) -> Result<Value, JsonError> {
        let mut object = Map::new();
        if self.skip(Kind::CloseBrace)? {
            return Ok(Value::Object(object));
        }
        loop {
            let Value::String(key) = self.value()? else {
                return Err(parse_error("key is not a string in object"));
            };
            self.expect(Kind::Colon, "missing : in object pair")?;
            let value = self.value()?;
            if object.contains_key(&key) {
                return Err(parse_error("duplicate key"));
            }
            object.insert(key, value);
            if self.skip(Kind::CloseBrace)? {
                return Ok(Value::Object(object));
            }
            self.expect(Kind::Comma, "expected separator in dict")?;
        }
    }

    fn array(&mut self) -> Result<Value, JsonError> {
        let mut array = Vec::new();
        if self.skip(Kind::CloseBracket)? {
            return Ok(Value::Array(array));
        }
        loop {
            array.push(self.value()?);
            if self.skip(Kind::CloseBracket)? {
                return Ok(Value::Array(array));
            }
            self.expect(Kind::Comma, "expected separator in list")?;
        }
    }

    fn take(&mut self) -> Result<&'a Token, JsonError> {
        let token = self
            .tokens
            .get(self.next)
            .ok_or_else(|| parse_error("premature EOI"))?;
        self.next += 1;
        Ok(token)
    }

    fn skip(&mut self, kind: Kind) -> Result<bool, JsonError> {
        let found = self.take()?.kind == kind;
        if !found {
            self.next -= 1;
        }
        Ok(found)
    }

    fn expect(&mut self, kind: Kind, otherwise: &str) -> Result<(), JsonError> {
        if self.take()?.kind == kind {
            Ok(())
        } else {
            Err(parse_error(otherwise))
        }
    }
}

pub(super) fn parse_error(text: impl std::fmt::Display) -> JsonError {
    JsonError(format!("JSON parse error, {text}"))
}

fn keyword(text: &[u8]) -> Result<Value, JsonError> {
    match text {
        b"true" => Ok(Value::Bool(true)),
        b"false" => Ok(Value::Bool(false)),
        b"null" => Ok(Value::Null),
        other => Err(parse_error(format_args!(
            "invalid keyword '{}'",
            String::from_utf8_lossy(other)
        ))),
    }
}

/// An integer if it fits `i64` or `u64`, else a double; a double without a finite value is refused
/// (QEMU reads it as infinity, which JSON cannot say).
fn number(text: &[u8]) -> Result<Value, JsonError> {
    let text = String::from_utf8_lossy(text);
    if let Ok(number) = text.parse::<i64>() {
        return Ok(number.into());
    }
    if let Ok(number) = text.parse::<u64>() {
        return Ok(number.into());
    }
    text.parse()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or_else(|| parse_error(format_args!("number '{text}' is out of range")))
}

/// The text between the quotes with escapes resolved. The lexer has seen to it that there are quotes
/// and that no escape is cut off by the closing one.
fn unquote(quoted: &[u8]) -> Result<String, JsonError> {
    let mut text = String::with_capacity(quoted.len());
    let mut rest = &quoted[1..];
    while rest.len() > 1 {
        let (character, used) = match rest[0] {
            b'\\' => escape(rest)?,
            0..=0x7f => (char::from(rest[0]), 1),
            _ => multibyte(rest)?,
        };
        text.push(character);
        rest = &rest[used..];
    }
    Ok(text)
}

fn escape(rest: &[u8]) -> Result<(char, usize), JsonError> {
    let character = match rest[1] {
        b'"' => '"',
        b'\'' => '\'',
        b'\\' => '\\',
        b'/' => '/',
        b'b' => '\u{8}',
        b'f' => '\u{c}',
        b'n' => '\n',
        b'r' => '\r',
        b't' => '\t',
        b'u' => return unicode_escape(rest),
        _ => return Err(parse_error("invalid escape sequence in string")),
    };
    Ok((character, 2))
}

fn unicode_escape(rest: &[u8]) -> Result<(char, usize), JsonError> {
    let invalid = || {
        let sequence = String::from_utf8_lossy(&rest[..rest.len().min(6)]);
        parse_error(format_args!("{sequence} is not a valid Unicode character"))
    };
    let first = hex4(rest).ok_or_else(invalid)?;
    let (code, used) = match (first, rest.get(6..).and_then(hex4)) {
        (0xd800..=0xdbff, Some(low @ 0xdc00..=0xdfff)) => {
            (0x10000 + ((first - 0xd800) << 10) + (low - 0xdc00), 12)
        }
        _ => (first, 6),
    };
    let character = char::from_u32(code).filter(|c| is_character(*c));
    Ok((character.ok_or_else(invalid)?, used))
}

/// The four digits of `\uXXXX` at the start of `text`.
fn hex4(text: &[u8]) -> Option<u32> {
    let digits = text.strip_prefix(b"\\u")?.get(..4)?;
    digits.iter().try_fold(0, |code, digit| {
        Some(code << 4 | char::from(*digit).to_digit(16)?)
    })
}

/// One character of two to four bytes in modified UTF-8: NUL may be written as C0 80.
fn multibyte(rest: &[u8]) -> Result<(char, usize), JsonError> {
    if rest.starts_with(&[0xc0, 0x80]) {
        return Ok(('\0', 2));
    }
    let length = match rest[0] {
        0xc2..=0xdf => 2,
        0xe0..=0xef => 3,
        _ => 4,
    };
    rest.get(..length)
        .and_then(|bytes| std::str::from_utf8(bytes).ok())
        .and_then(|text| text.chars().next())
        .filter(|character| is_character(*character))
        .map(|character| (character, length))
        .ok_or_else(|| parse_error("invalid UTF-8 sequence in string"))
}

/// Unicode's "noncharacters" are refused.
fn is_character(character: char) -> bool {
    let code = character as u32;
    !(0xfdd0..=0xfdef).contains(&code) && code & 0xfffe != 0xfffe
}
