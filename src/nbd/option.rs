//! Data of handshake options, parsed.

use super::fields::{Fields, WrongLength};
use super::protocol::rep;

/// Longest string the protocol allows, in bytes.
pub const MAX_STRING_LENGTH: usize = 4096;

/// Most option data that is held in memory, in bytes; longer options are skipped and refused.
pub const MAX_OPTION_LENGTH: usize = 256 << 10;

/// Why an option is refused: reply type and a text for people.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) reply: u32,
    pub(super) text: String,
}

impl Refusal {
    pub(super) fn new(reply: u32, text: impl Into<String>) -> Self {
        Self {
            reply,
            text: text.into(),
        }
    }

    pub(super) fn invalid(text: impl Into<String>) -> Self {
        Self::new(rep::ERR_INVALID, text)
    }
}

/// Data of `NBD_OPT_INFO` and `NBD_OPT_GO`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InfoOption {
    pub(super) name: String,
    pub(super) requests: Vec<u16>,
}

impl InfoOption {
    pub(super) fn parse(data: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Fields(data);
        let name = string(&mut fields)?;
        let count = fields.u16()?;
        let requests = (0..count).map(|_| fields.u16()).collect::<Result<_, _>>()?;
        fields.end()?;
        Ok(Self { name, requests })
    }
}

/// Data of `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MetaContextOption {
    pub(super) name: String,
    pub(super) queries: Vec<String>,
}

impl MetaContextOption {
    pub(super) fn parse(data: &[u8]) -> Result<Self, Refusal> {
        let mut fields = Fields(data);
        let name = string(&mut fields)?;
        let count = fields.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(string(&mut fields)?);
        }
        fields.end()?;
        Ok(Self { name, queries })
    }
}

/// A string of the protocol: UTF-8 without NUL, at most [`MAX_STRING_LENGTH`] bytes.
pub(super) fn parse_string(bytes: &[u8]) -> Result<String, Refusal> {
    if bytes.len() > MAX_STRING_LENGTH {
        return Err(Refusal::invalid(format!(
            "string of {} bytes is longer than {MAX_STRING_LENGTH}",
            bytes.len()
        )));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(Refusal::invalid("string is not UTF-8 without NUL")),
    }
}

impl From<WrongLength> for Refusal {
    fn from(wrong: WrongLength) -> Self {
        match wrong {
            WrongLength::Short => Self::invalid("option data is too short"),
            WrongLength::Long(extra) => {
                Self::invalid(format!("option data has {extra} bytes too many"))
            }
        }
    }
}

fn string(fields: &mut Fields<'_>) -> Result<String, Refusal> {
    let length = fields.u32()? as usize;
    parse_string(fields.bytes(length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_option_is_parsed() {
        let data = b"\0\0\0\x02ab\0\x02\0\x03\0\x01";
        let option = InfoOption::parse(data).unwrap();
        assert_eq!(
            option,
            InfoOption {
                name: "ab".into(),
                requests: vec![3, 1]
            }
        );
    }

    #[test]
    fn lengths_that_lie_are_invalid() {
        for data in [
            &b""[..],
            b"\0\0\0\x05ab\0\0",
            b"\xff\xff\xff\xffab",
            b"\0\0\0\x02ab\0\x02\0\x03",
            b"\0\0\0\0\0\0x",
        ] {
            assert_eq!(
                InfoOption::parse(data).unwrap_err().reply,
                rep::ERR_INVALID,
                "{data:?}"
            );
        }
        assert!(MetaContextOption::parse(b"\0\0\0\x01a\xff\xff\xff\xff").is_err());
    }

    #[test]
    fn strings_are_utf8_without_nul_and_short() {
        assert!(parse_string(b"a\0b").is_err());
        assert!(parse_string(b"\xff").is_err());
        assert!(parse_string(&[b'x'; MAX_STRING_LENGTH]).is_ok());
        assert!(parse_string(&[b'x'; MAX_STRING_LENGTH + 1]).is_err());
    }
}
