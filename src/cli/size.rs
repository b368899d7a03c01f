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
}
