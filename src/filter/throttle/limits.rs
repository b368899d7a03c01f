//! What a throttle group allows, by QEMU's names and with QEMU's conditions.

use crate::error::{Error, ErrorKind, Result};

/// The largest rate and burst rate.
const MOST: i64 = 1_000_000_000_000_000;

/// What a limit counts, in the order of [`KINDS`].
pub(super) const BYTES: [usize; 3] = [0, 1, 2];
/// As [`BYTES`], for requests.
pub(super) const REQUESTS: [usize; 3] = [3, 4, 5];

/// Names of the limits: both directions together, reads, writes.
pub(super) const KINDS: [&str; 6] = [
    "bps-total",
    "bps-read",
    "bps-write",
    "iops-total",
    "iops-read",
    "iops-write",
];

/// One limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Bytes or requests a second; 0: no limit.
    pub average: i64,
    /// Bytes or requests a second in a burst; 0: no bursts.
    pub max: i64,
    /// Seconds for which a burst may last.
    pub max_length: i64,
}

/// The limits of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleLimits {
    pub(super) rates: [Rate; 6],
    /// Bytes above which a request counts as more than one; 0: each is one.
    pub(super) iops_size: i64,
}

impl Default for ThrottleLimits {
    fn default() -> ThrottleLimits {
        let unlimited = Rate {
            average: 0,
            max: 0,
            max_length: 1,
        };
        ThrottleLimits {
            rates: [unlimited; 6],
            iops_size: 0,
        }
    }
}

impl ThrottleLimits {
    /// Every property with its value: `bps-total`, `bps-total-max`, `bps-total-max-length`, …, `iops-size`.
    pub fn properties(&self) -> Vec<(String, i64)> {
        let mut all = Vec::new();
        for (kind, rate) in KINDS.iter().zip(&self.rates) {
            all.push(((*kind).to_owned(), rate.average));
            all.push((format!("{kind}-max"), rate.max));
            all.push((format!("{kind}-max-length"), rate.max_length));
        }
        all.push(("iops-size".to_owned(), self.iops_size));
        all
    }

    /// The value of a property.
    pub fn property(&self, name: &str) -> Option<i64> {
        let mut all = self.properties().into_iter();
        all.find(|(other, _)| other == name).map(|(_, value)| value)
    }

    /// Another value for a property; false where there is none of this name.
    pub fn set(&mut self, name: &str, value: i64) -> bool {
        if name == "iops-size" {
            self.iops_size = value;
            return true;
        }
        for (kind, rate) in KINDS.iter().zip(&mut self.rates) {
            let place = match name.strip_prefix(kind) {
                Some("") => &mut rate.average,
                Some("-max") => &mut rate.max,
                Some("-max-length") => &mut rate.max_length,
                _ => continue,
            };
            *place = value;
            return true;
        }
        false
    }

    /// The limits go together.
    ///
    /// # Errors
    /// In QEMU's words.
    pub fn check(&self) -> Result<()> {
        let average = |index: usize| self.rates[index].average != 0;
        let max = |index: usize| self.rates[index].max != 0;
        for [total, read, write] in [BYTES, REQUESTS] {
            let both = average(total) && (average(read) || average(write));
            if both || (max(total) && (max(read) || max(write))) {
                return Err(invalid(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                ));
            }
        }
        if self.iops_size != 0 && !REQUESTS.iter().any(|index| average(*index)) {
            return Err(invalid("iops size requires an iops value to be set"));
        }
        if self.iops_size < 0 {
            return Err(out_of_range());
        }
        self.rates.iter().try_for_each(Rate::check)
    }
}

impl Rate {
    fn check(&self) -> Result<()> {
        let range = 0..=MOST;
        if !range.contains(&self.average) || !range.contains(&self.max) {
            return Err(out_of_range());
        }
        if !(0..=i64::from(u32::MAX)).contains(&self.max_length) {
            let most = u32::MAX;
            return Err(invalid(format!(
                "the burst length must be within [0, {most}]"
            )));
        }
        if self.max_length == 0 {
            return Err(invalid("the burst length cannot be 0"));
        }
        if self.max_length > 1 && self.max == 0 {
            return Err(invalid("burst length set without burst rate"));
        }
        if self.max != 0 && self.max_length > MOST / self.max {
            return Err(invalid("burst length too high for this burst rate"));
        }
        if self.max != 0 && self.average == 0 {
            return Err(invalid(
                "bps_max/iops_max require corresponding bps/iops values",
            ));
        }
        if self.max != 0 && self.max < self.average {
            return Err(invalid("bps_max/iops_max cannot be lower than bps/iops"));
        }
        Ok(())
    }
}

fn out_of_range() -> Error {
    invalid(format!("bps/iops/max values must be within [0, {MOST}]"))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidArgument, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(values: &[(&str, i64)]) -> String {
        let mut limits = ThrottleLimits::default();
        for (name, value) in values {
            assert!(limits.set(name, *value), "{name}");
            assert_eq!(limits.property(name), Some(*value));
        }
        match limits.check() {
            Ok(()) => String::new(),
            Err(error) => error.message().to_owned(),
        }
    }

    #[test]
    fn limits_go_together_or_are_refused() {
        assert_eq!(text(&[("iops-total", 100), ("bps-read", 5)]), "");
        let burst = [
            ("bps-read", 5),
            ("bps-read-max", 9),
            ("bps-read-max-length", 3),
        ];
        assert_eq!(text(&burst), "");
        let clash = text(&[("bps-total", 5), ("bps-write", 5)]);
        assert!(
            clash.ends_with("cannot be used at the same time"),
            "{clash}"
        );
        let range = text(&[("iops-total", -1)]);
        assert_eq!(
            range,
            "bps/iops/max values must be within [0, 1000000000000000]"
        );
        let low = text(&[("iops-total", 50), ("iops-total-max", 10)]);
        assert_eq!(low, "bps_max/iops_max cannot be lower than bps/iops");
        let size = text(&[("iops-size", 10)]);
        assert_eq!(size, "iops size requires an iops value to be set");
        assert!(!ThrottleLimits::default().set("iops", 1));
    }
}
