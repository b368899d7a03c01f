//! Text in the URIs of exports.

/// Letters, digits, `-._~/:` and what else may stand in that place stay; every other byte is `%XX`.
pub fn percent_encoded(text: &str, may_stand: &[u8]) -> String {
    let is_plain = |byte: u8| {
        byte.is_ascii_alphanumeric() || b"-._~/:".contains(&byte) || may_stand.contains(&byte)
    };
    text.bytes()
        .map(|byte| match is_plain(byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_meaning_in_uris_is_encoded() {
        assert_eq!(
            percent_encoded("/run/a b?\u{e4}@", b"@"),
            "/run/a%20b%3F%C3%A4@"
        );
        assert_eq!(percent_encoded("a@b", b""), "a%40b");
    }
}
