//! Holding a value against a type: everything is checked before a command runs, and the first problem is
//! reported in QEMU's words.
//!
//! Order: members in the order of the schema, a member's inside before the next member, what is unknown
//! last. Texts name a member by its full path, except where QEMU does not (enums and integer ranges).

use serde_json::{Map, Number, Value};

use super::{Alternate, Enum, Int, Member, Object, Type};
use crate::qmp::error::QmpError;

/// What scalars look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    /// JSON: every scalar has its own type.
    Json,
    /// `key=value`: every scalar is a string, and the type says what it means.
    Keyval,
}

/// Checks a value against an object type; the result is typed JSON in both dialects.
///
/// # Errors
/// The first thing that does not fit.
pub fn check(object: &'static Object, value: Value, dialect: Dialect) -> Result<Value, QmpError> {
    let mut checker = Checker {
        dialect,
        path: Vec::new(),
    };
    checker.object(object, value)
}

struct Checker {
    dialect: Dialect,
    path: Vec<Step>,
}

enum Step {
    Member(&'static str),
    Element(usize),
}

impl Checker {
    fn value(&mut self, ty: Type, value: Value) -> Result<Value, QmpError> {
        if self.dialect == Dialect::Keyval && ty.is_scalar() && !value.is_string() {
            return Err(self.error(format_args!(
                "Parameters '{}.*' are unexpected",
                self.name()
            )));
        }
        match ty {
            Type::Any => Ok(value),
            Type::Object(object) => self.object(object, value),
            Type::Array(element) => self.array(*element, value),
            Type::Alternate(alternate) => self.alternate(alternate, value),
            Type::Enum(kind) => self.enumeration(kind, value),
            Type::Str if value.is_string() => Ok(value),
            Type::Str => Err(self.expected("string")),
            Type::Null if value.is_null() => Ok(value),
            Type::Null => Err(self.expected("null")),
            Type::Bool => self.boolean(value),
            Type::Number => self.number(value),
            Type::Int(kind) => self.integer(kind, value),
        }
    }

    fn object(&mut self, object: &'static Object, value: Value) -> Result<Value, QmpError> {
        let Value::Object(mut given) = value else {
            return Err(self.expected("object"));
        };
        let mut checked = Map::new();
        self.members(object, &mut given, &mut checked)?;
        match given.keys().next() {
            None => Ok(Value::Object(checked)),
            Some(unknown) => {
                let name = self.name_of(unknown);
                Err(self.error(format_args!("Parameter '{name}' is unexpected")))
            }
        }
    }

    /// Moves the members that the type has from `given` to `checked`.
    fn members(
        &mut self,
        object: &'static Object,
        given: &mut Map<String, Value>,
        checked: &mut Map<String, Value>,
    ) -> Result<(), QmpError> {
        for member in object.all_members() {
            match given.shift_remove(member.name) {
                Some(value) => {
                    checked.insert(member.name.into(), self.member(member, value)?);
                }
                None if member.optional => {}
                None => {
                    let name = self.name_of(member.name);
                    return Err(self.error(format_args!("Parameter '{name}' is missing")));
                }
            }
        }
        let tag = object
            .variants
            .and_then(|variants| checked.get(variants.tag));
        match tag
            .and_then(Value::as_str)
            .and_then(|case| object.branch(case))
        {
            Some(branch) => self.members(branch, given, checked),
            None => Ok(()),
        }
    }

    fn member(&mut self, member: &'static Member, value: Value) -> Result<Value, QmpError> {
        self.path.push(Step::Member(member.name));
        let checked = match member.refused {
            Some(why) => Err(self.error(format_args!(
                "Parameter '{}' is not supported: {why}",
                self.name()
            ))),
            None => self.value(member.ty, value),
        };
        self.path.pop();
        checked
    }

    fn array(&mut self, element: Type, value: Value) -> Result<Value, QmpError> {
        let Value::Array(elements) = value else {
            return Err(self.expected("array"));
        };
        let mut checked = Vec::with_capacity(elements.len());
        for (index, value) in elements.into_iter().enumerate() {
            self.path.push(Step::Element(index));
            checked.push(self.value(element, value)?);
            self.path.pop();
        }
        Ok(Value::Array(checked))
    }

    fn alternate(&mut self, alternate: &Alternate, value: Value) -> Result<Value, QmpError> {
        match alternate.types.iter().find(|ty| ty.takes(&value)) {
            Some(ty) => self.value(*ty, value),
            None => Err(self.expected(alternate.name)),
        }
    }

    fn enumeration(&self, kind: &Enum, value: Value) -> Result<Value, QmpError> {
        let Value::String(text) = &value else {
            return Err(self.expected("string"));
        };
        if kind.values.contains(&text.as_str()) {
            return Ok(value);
        }
        Err(self.error(format_args!(
            "Parameter '{}' does not accept value '{text}'",
            self.bare_name()
        )))
    }

    fn boolean(&self, value: Value) -> Result<Value, QmpError> {
        match (self.dialect, value.as_str()) {
            (Dialect::Json, _) if value.is_boolean() => Ok(value),
            (Dialect::Json, _) => Err(self.expected("boolean")),
            (Dialect::Keyval, Some("on" | "yes" | "true" | "y")) => Ok(true.into()),
            (Dialect::Keyval, Some("off" | "no" | "false" | "n")) => Ok(false.into()),
            (Dialect::Keyval, _) => Err(self.expects("'on' or 'off'")),
        }
    }

    fn number(&self, value: Value) -> Result<Value, QmpError> {
        match (self.dialect, value.as_str()) {
            (Dialect::Json, _) if value.is_number() => Ok(value),
            (Dialect::Json, _) => Err(self.expected("number")),
            (Dialect::Keyval, text) => text
                .and_then(|text| text.parse().ok())
                .and_then(Number::from_f64)
                .map(Value::Number)
                .ok_or_else(|| self.expects("number")),
        }
    }

    fn integer(&self, kind: Int, value: Value) -> Result<Value, QmpError> {
        let signed = kind == Int::I64;
        let number = match (self.dialect, value.as_str()) {
            (Dialect::Json, _) => {
                json_integer(&value, signed).ok_or_else(|| self.expected("integer"))?
            }
            (Dialect::Keyval, text) if kind == Int::Size => {
                let size = text.and_then(parse_size);
                size.map(i128::from).ok_or_else(|| self.expects("size"))?
            }
            (Dialect::Keyval, text) => text
                .and_then(|text| parse_integer(text, signed))
                .ok_or_else(|| self.expects("integer"))?,
        };
        match kind {
            Int::I64 => i64::try_from(number).map(Value::from).ok(),
            Int::U64 | Int::Size => u64::try_from(number).map(Value::from).ok(),
            Int::U32 => u32::try_from(number).map(Value::from).ok(),
            Int::U16 => u16::try_from(number).map(Value::from).ok(),
            Int::U8 => u8::try_from(number).map(Value::from).ok(),
        }
        .ok_or_else(|| {
            let (name, c_name) = (self.bare_name(), kind.c_name());
            self.error(format_args!("Parameter '{name}' expects {c_name}"))
        })
    }

    fn expected(&self, what: &str) -> QmpError {
        let name = self.name();
        self.error(format_args!(
            "Invalid parameter type for '{name}', expected: {what}"
        ))
    }

    fn expects(&self, what: &str) -> QmpError {
        self.error(format_args!("Parameter '{}' expects {what}", self.name()))
    }

    fn error(&self, text: std::fmt::Arguments<'_>) -> QmpError {
        QmpError::generic(text.to_string())
    }

    /// The full path of what is being checked.
    fn name(&self) -> String {
        let mut name = String::new();
        for step in &self.path {
            match step {
                Step::Member(member) if name.is_empty() => name.push_str(member),
                Step::Member(member) => name.extend([".", member]),
                Step::Element(index) if self.dialect == Dialect::Keyval => {
                    name.push_str(&format!(".{index}"));
                }
                Step::Element(index) => name.push_str(&format!("[{index}]")),
            }
        }
        name
    }

    /// The full path of a member of what is being checked.
    fn name_of(&self, member: &str) -> String {
        match self.path.is_empty() {
            true => member.into(),
            false => format!("{}.{member}", self.name()),
        }
    }

    /// The name without a path; list elements have none, and QEMU prints that as `null`.
    fn bare_name(&self) -> &'static str {
        match self.path.last() {
            Some(Step::Member(name)) => name,
            _ => "null",
        }
    }
}

impl Type {
    fn is_scalar(&self) -> bool {
        !matches!(
            self,
            Type::Any | Type::Object(_) | Type::Array(_) | Type::Alternate(_)
        )
    }

    /// Whether a JSON value is of this type as far as an alternate looks.
    fn takes(&self, value: &Value) -> bool {
        match self {
            Type::Str | Type::Enum(_) => value.is_string(),
            Type::Int(_) | Type::Number => value.is_number(),
            Type::Bool => value.is_boolean(),
            Type::Null => value.is_null(),
            Type::Object(_) => value.is_object(),
            Type::Array(_) => value.is_array(),
            Type::Any | Type::Alternate(_) => true,
        }
    }
}

/// A JSON number as an integer; negative ones wrap around where the type is unsigned.
fn json_integer(value: &Value, signed: bool) -> Option<i128> {
    match (value.as_i64(), value.as_u64()) {
        (Some(number), _) if number < 0 && !signed => Some(i128::from(number as u64)),
        (Some(number), _) => Some(number.into()),
        (None, Some(number)) if !signed => Some(number.into()),
        _ => None,
    }
}

/// Decimal, octal or hexadecimal, with leading blanks and a sign, as C's `strtoll` reads it.
fn parse_integer(text: &str, signed: bool) -> Option<i128> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    let (negative, digits) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    let number = parse_digits(digits)?;
    let number = if negative { -number } else { number };
    match signed {
        true => i64::try_from(number).ok().map(i128::from),
        false if negative && number < 0 => {
            let wrapped = (number + (1 << 64)).max(0);
            u64::try_from(wrapped).ok().map(i128::from)
        }
        false => u64::try_from(number).ok().map(i128::from),
    }
}

fn parse_digits(digits: &str) -> Option<i128> {
    let (digits, radix) = match digits.as_bytes() {
        [b'0', b'x' | b'X', _, ..] => (&digits[2..], 16),
        [b'0', _, ..] => (&digits[1..], 8),
        _ => (digits, 10),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok().map(i128::from)
}

/// A number of bytes with an optional suffix B, K, M, G, T, P or E and, with a suffix, an optional fraction.
fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'B' if !text.starts_with("0x") => (&text[..text.len() - 1], 0),
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        b'P' => (&text[..text.len() - 1], 50),
        b'E' if !text.starts_with("0x") => (&text[..text.len() - 1], 60),
        _ => (text, 0),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let decimal = |text: &str| text.bytes().all(|digit| digit.is_ascii_digit());
    let number: u64 = match whole.strip_prefix("0x") {
        Some(hexadecimal) if shift == 0 => u64::from_str_radix(hexadecimal, 16).ok()?,
        _ if decimal(whole) => whole.parse().ok()?,
        _ => return None,
    };
    let bytes = number.checked_mul(1 << shift)?;
    match fraction {
        "" => Some(bytes),
        _ if shift == 0 || !decimal(fraction) => None,
        _ => {
            let part = format!("0.{fraction}").parse::<f64>().ok()? * (1_u64 << shift) as f64;
            bytes.checked_add(part as u64)
        }
    }
}
