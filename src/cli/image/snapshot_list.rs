//! Internal snapshots as qemu-img lists them. Dates are UTC.

use std::fmt::Write;

use serde_json::Value;

use crate::format::qcow2::snapshot_table::InternalSnapshot;
use crate::qmp::commands::snapshot_info;

use super::super::size::human;

const SECOND: u64 = 1_000_000_000;

pub(super) fn json_of(snapshots: &[InternalSnapshot]) -> Value {
    snapshots.iter().map(snapshot_info).collect()
}

pub(super) fn write(snapshots: &[InternalSnapshot], out: &mut String) -> std::fmt::Result {
    writeln!(out, "Snapshot list:")?;
    line(out, ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"])?;
    for snapshot in snapshots {
        let size = human(snapshot.vm_state_size);
        let (date, clock) = (date(u64::from(snapshot.date.0)), clock(snapshot.vm_clock));
        let count = snapshot
            .instructions
            .map_or(String::new(), |count| count.to_string());
        line(
            out,
            [&snapshot.id, &snapshot.name, &size, &date, &clock, &count],
        )?;
    }
    Ok(())
}

fn line(out: &mut String, columns: [&str; 6]) -> std::fmt::Result {
    let [id, tag, size, date, clock, count] = columns;
    writeln!(
        out,
        "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {count:>10}"
    )
}

/// `HHHH:MM:SS.mmm`
fn clock(nanoseconds: u64) -> String {
    let seconds = nanoseconds / SECOND;
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let milliseconds = nanoseconds % SECOND / 1_000_000;
    format!(
        "{hours:04}:{minutes:02}:{:02}.{milliseconds:03}",
        seconds % 60
    )
}

/// `YYYY-MM-DD HH:MM:SS`, by the proleptic Gregorian calendar, years counted from March.
fn date(seconds: u64) -> String {
    let days = seconds / 86400 + 719_468;
    let era = days / 146_097;
    let day_of_era = days % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (seconds / 3600 % 24, seconds / 60 % 60);
    format!(
        "{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}",
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_and_clocks() {
        assert_eq!(date(0), "1970-01-01 00:00:00");
        assert_eq!(date(951_782_399), "2000-02-28 23:59:59");
        assert_eq!(date(951_782_400), "2000-02-29 00:00:00");
        assert_eq!(date(1_795_444_795), "2026-11-23 14:39:55");
        assert_eq!(clock(3_723_004_000_000), "0001:02:03.004");
    }
}
