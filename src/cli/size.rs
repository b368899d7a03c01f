//! Sizes as people write and read them: powers of 1024, in the words of qemu-img.

const UNITS: &[&str] = &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Three significant digits and a unit: `8 MiB`, `4.31 MiB`, `0 B`.
pub(super) fn human(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", significant(value), UNITS[unit])
}

/// At most three significant digits, no trailing zeroes, as C's `%0.3g` below 1000.
fn significant(value: f64) -> String {
    let decimals = match value {
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// Bytes from `NUMBER[SUFFIX]`; the suffix is one of b, k, M, G, T, P, E (any case, `iB` may follow).
///
/// # Errors
/// No number, an unknown suffix, or more than 2^63 - 1 bytes: what is wrong, for clap.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let wrong = || format!("'{text}' is not a size: a number and one of b, k, M, G, T, P, E");
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let letter = suffix.strip_suffix("iB").unwrap_or(suffix);
    let exponent = match letter.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        "p" => 5,
        "e" => 6,
        _ => return Err(wrong()),
    };
    number
        .checked_mul(1 << (10 * exponent))
        .filter(|bytes| *bytes <= i64::MAX as u64)
        .ok_or_else(|| format!("'{text}' is more than 2^63 - 1 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The texts are what qemu-img 10.0 prints for these numbers.
    #[test]
    fn people_read_what_qemu_img_prints() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (200704, "196 KiB"),
            (197120, "192 KiB"),
            (8 << 20, "8 MiB"),
            (4521984, "4.31 MiB"),
            (1 << 60, "1 EiB"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn sizes_are_read_with_their_suffix() {
        assert_eq!(parse("512"), Ok(512));
        assert_eq!(parse("10G"), Ok(10 << 30));
        assert_eq!(parse("64KiB"), Ok(64 << 10));
        assert_eq!(parse("7E"), Ok(7 << 60));
        for text in ["", "G", "1x", "-1", "8E", "1.5G", "99999999999999999999"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
