//! How far a job is, on standard error: a bar on a terminal, lines elsewhere.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write, stderr};
use std::time::Duration;

use super::job_view::JobView;
use super::size::human;

/// The rate is that of so much of the past.
const WINDOW: Duration = Duration::from_secs(5);

/// Where there is no terminal, a line comes so often at most, if nothing but the progress changes.
const BETWEEN_LINES: Duration = Duration::from_secs(10);

const BAR_WIDTH: usize = 28;

/// How fast a job gets ahead.
#[derive(Default)]
struct Rate {
    samples: VecDeque<(Duration, u64)>,
}

impl Rate {
    fn see(&mut self, at: Duration, current: u64) {
        self.samples.push_back((at, current));
        while self.samples.len() > 2 && at - self.samples[1].0 >= WINDOW {
            self.samples.pop_front();
        }
    }

    /// Bytes a second; `None` until something has moved.
    fn per_second(&self) -> Option<f64> {
        let (first, last) = (self.samples.front()?, self.samples.back()?);
        let seconds = (last.0 - first.0).as_secs_f64();
        let bytes = last.1.saturating_sub(first.1);
        (seconds > 0.0 && bytes > 0).then(|| bytes as f64 / seconds)
    }
}

/// Shows one job, as long as it is looked at.
pub(super) struct Display {
    on_terminal: bool,
    rate: Rate,
    /// What was shown last: when, and the status.
    shown: Option<(Duration, String)>,
}

impl Display {
    pub(super) fn new() -> Display {
        Display {
            on_terminal: stderr().is_terminal(),
            rate: Rate::default(),
            shown: None,
        }
    }

    /// Shows the job as it is `at` so long after the start.
    pub(super) fn show(&mut self, at: Duration, job: &JobView) {
        self.rate.see(at, job.current);
        let rate = self.rate.per_second();
        if self.on_terminal {
            eprint!("\r{}\x1b[K", bar(job, rate));
            // What cannot be shown is not missed.
            let _ = stderr().flush();
        } else if self.is_news(at, job) {
            eprintln!("{}", line(job, rate));
            self.shown = Some((at, state(job)));
        }
    }

    /// Nothing more is shown.
    pub(super) fn end(&self) {
        if self.on_terminal {
            eprintln!();
        }
    }

    fn is_news(&self, at: Duration, job: &JobView) -> bool {
        match &self.shown {
            None => true,
            Some((_, before)) if *before != state(job) => true,
            Some((last, _)) => at - *last >= BETWEEN_LINES,
        }
    }
}

/// The status, and what is to be done where somebody is waited for.
fn state(job: &JobView) -> String {
    let id = &job.id;
    match (job.stopped_by(), &*job.status) {
        (Some("nospace"), _) => {
            format!("stopped, no space left: make room, then 'liveblk job resume {id}'")
        }
        (Some(_), _) => format!(
            "stopped by an I/O error: 'liveblk job resume {id}' tries again, 'liveblk job cancel --force {id}' gives up"
        ),
        (None, "paused" | "standby") => format!("paused, 'liveblk job resume {id}' lets it go on"),
        (None, "pending") => format!("waits for 'liveblk job finalize {id}'"),
        (None, status) => status.to_string(),
    }
}

fn line(job: &JobView, rate: Option<f64>) -> String {
    let mut line = format!("{}: {}, {} %", job.id, state(job), job.percent());
    if job.total > 0 {
        line += &format!(", {} of {}", human(job.current), human(job.total));
    }
    line + &speed(job, rate, ", ")
}

fn bar(job: &JobView, rate: Option<f64>) -> String {
    let percent = job.percent();
    let full = BAR_WIDTH * usize::try_from(percent).unwrap_or(100) / 100;
    let (full, empty) = ("#".repeat(full), " ".repeat(BAR_WIDTH - full));
    let what = match &*job.status {
        "running" => String::new(),
        _ => format!("  {}", state(job)),
    };
    let rate = speed(job, rate, "  ");
    format!("{} [{full}{empty}] {percent:3} %{rate}{what}", job.id)
}

/// Rate and time left, where they say something.
fn speed(job: &JobView, rate: Option<f64>, separator: &str) -> String {
    let Some(rate) = rate.filter(|_| job.status == "running") else {
        return String::new();
    };
    let left = job.total.saturating_sub(job.current) as f64 / rate;
    let (rate, left) = (human(rate as u64), time(left as u64));
    format!("{separator}{rate}/s{separator}{left} left")
}

/// `7 s`, `2:05`, `1:02:05`.
fn time(seconds: u64) -> String {
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest} s"),
        (0, minutes) => format!("{minutes}:{rest:02}"),
        (hours, minutes) => format!("{hours}:{minutes:02}:{rest:02}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::job_view::tests::job;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn rate_and_time_left_are_those_of_the_last_seconds() {
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(), None);
        for second in 0..=20 {
            let fast = u64::from(second > 10) * u64::from(second.max(10) - 10) * (9 << 20);
            rate.see(SECOND * second, u64::from(second) * (1 << 20) + fast);
        }
        let per_second = rate.per_second();
        assert_eq!(per_second, Some(f64::from(10 << 20)));
        let job = job("c0", "running", 120 << 20, 1320 << 20);
        assert_eq!(
            line(&job, per_second),
            "c0: running, 9 %, 120 MiB of 1.29 GiB, 10 MiB/s, 2:00 left"
        );
        let drawn = bar(&job, per_second);
        assert_eq!(
            drawn,
            format!("c0 [##{}]   9 %  10 MiB/s  2:00 left", " ".repeat(26))
        );
    }

    #[test]
    fn who_is_waited_for_is_told() {
        let mut job = job("c0", "paused", 1, 2);
        assert!(line(&job, None).contains("'liveblk job resume c0' lets it go on"));
        if let Some(block) = &mut job.block {
            block.paused = true;
            block.io_status = "nospace".into();
        }
        assert!(line(&job, None).contains("make room, then 'liveblk job resume c0'"));
        job.status = "pending".into();
        job.block = None;
        assert!(line(&job, None).contains("'liveblk job finalize c0'"));
    }

    #[test]
    fn lines_come_when_something_changes_and_now_and_then() {
        let mut display = Display {
            on_terminal: false,
            rate: Rate::default(),
            shown: None,
        };
        let running = job("c0", "running", 1, 2);
        assert!(display.is_news(Duration::ZERO, &running));
        display.show(Duration::ZERO, &running);
        assert!(!display.is_news(SECOND, &running));
        assert!(display.is_news(SECOND * 10, &running));
        assert!(display.is_news(SECOND, &job("c0", "ready", 2, 2)));
    }

    #[test]
    fn times_are_short() {
        assert_eq!(time(7), "7 s");
        assert_eq!(time(125), "2:05");
        assert_eq!(time(3725), "1:02:05");
    }
}
