//! Seeds of a test run: how many, which, and what to say when one fails.

/// Variable that replays one seed.
pub const SEED_VARIABLE: &str = "LIVEBLK_SEED";
/// Variable that multiplies how many seeds are tried.
pub const SCALE_VARIABLE: &str = "LIVEBLK_TEST_SCALE";

/// How much longer than usual tests shall run: at least 1.
pub fn scale() -> u64 {
    number(SCALE_VARIABLE).unwrap_or(1).max(1)
}

/// Runs `test` with `count` seeds, times the scale; with the one of the environment where that is
/// set. A panic in `test` tells the seed and how to replay it.
pub fn for_each_seed(name: &str, count: u64, mut test: impl FnMut(u64)) {
    let mut run = |seed| {
        let _told = Tell { name, seed };
        test(seed);
    };
    match number(SEED_VARIABLE) {
        Some(seed) => run(seed),
        None => (1..=count * scale()).for_each(run),
    }
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    match value.parse() {
        Ok(number) => Some(number),
        Err(_) => panic!("{variable}='{value}' is not a number"),
    }
}

struct Tell<'a> {
    name: &'a str,
    seed: u64,
}

impl Drop for Tell<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Tell { name, seed } = self;
            eprintln!("seed {seed} failed; replay: {SEED_VARIABLE}={seed} cargo test {name}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_seed_ends_the_run_there() {
        if std::env::var_os(SEED_VARIABLE).is_some() {
            eprintln!("skipped: {SEED_VARIABLE} picks one seed");
            return;
        }
        let mut tried = 0;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for_each_seed("a_failing_seed", 5, |seed| {
                tried = seed;
                assert!(seed < 3, "seed three is bad");
            });
        }));
        assert!(result.is_err());
        assert_eq!(tried, 3);
    }
}
