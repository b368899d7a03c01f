//! Where in a run power fails.

use std::iter::StepBy;
use std::ops::RangeInclusive;

/// About so many of a run's operations, which count from 1, spread over it; others with each seed.
pub(crate) fn points(seed: u64, operations: u64, crashes: u64) -> StepBy<RangeInclusive<u64>> {
    let step = (operations / crashes).max(1);
    (1 + seed % step..=operations).step_by(step as usize)
}

/// Runs once without a crash, then with one at each of so many points. A run answers how many operations it had,
/// and how much it found that is not dirty; the sum of these is the answer.
pub(crate) fn sweep(
    seed: u64,
    crashes: u64,
    crash_at: impl Fn(Option<u64>) -> Result<(u64, u64), String>,
) -> Result<u64, String> {
    let (operations, mut clean) = crash_at(None)?;
    for operation in points(seed, operations, crashes) {
        let (_, more) =
            crash_at(Some(operation)).map_err(|wrong| format!("crash at {operation}: {wrong}"))?;
        clean += more;
    }
    Ok(clean)
}
