//! A job as people and programs are shown it, put together from QMP's two lists of jobs.

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

use super::qmp_client::QmpClient;
use super::size::human;

/// What `query-jobs` and, for block jobs, `query-block-jobs` tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JobView {
    pub(super) id: String,
    pub(super) kind: String,
    pub(super) status: String,
    /// Bytes of work that are done.
    pub(super) current: u64,
    /// Bytes of work, as far as is known.
    pub(super) total: u64,
    /// Why it has failed or that it was cancelled, if so.
    pub(super) error: Option<String>,
    pub(super) block: Option<BlockJob>,
}

/// What only block jobs have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockJob {
    /// Bytes a second at most; 0 is no limit.
    pub(super) speed: u64,
    pub(super) paused: bool,
    /// `ok`, or why it was stopped: `failed`, `nospace`.
    pub(super) io_status: String,
}

/// The jobs of an instance, the oldest first.
///
/// # Errors
/// The connection broke, or an answer is not understood.
pub(super) fn query(client: &mut QmpClient) -> Result<Vec<JobView>> {
    let jobs = client.execute("query-jobs", Map::new())?;
    let block_jobs = client.execute("query-block-jobs", Map::new())?;
    read(&jobs, &block_jobs).ok_or_else(|| {
        let text = "the answer about jobs is not understood";
        Error::new(ErrorKind::Unsupported, text)
    })
}

pub(super) fn read(jobs: &Value, block_jobs: &Value) -> Option<Vec<JobView>> {
    let block_jobs = block_jobs.as_array()?;
    let jobs = jobs.as_array()?.iter().rev();
    jobs.map(|job| JobView::read(job, block_jobs)).collect()
}

impl JobView {
    /// It is ready some time, and ends then in one way or another.
    pub(super) fn follows(&self) -> bool {
        matches!(&*self.kind, "commit" | "mirror")
    }

    /// What takes the active layer's place when the job is told to complete.
    pub(super) fn new_layer(&self) -> &'static str {
        match &*self.kind {
            "mirror" => "the copy",
            _ => "the base",
        }
    }

    fn read(job: &Value, block_jobs: &[Value]) -> Option<JobView> {
        let text = |name: &str| job.get(name)?.as_str().map(str::to_string);
        let id = text("id")?;
        let block = block_jobs.iter().find(|block| block["device"] == id);
        Some(JobView {
            kind: text("type")?,
            status: text("status")?,
            current: job.get("current-progress")?.as_u64()?,
            total: job.get("total-progress")?.as_u64()?,
            error: text("error"),
            block: match block {
                Some(block) => Some(BlockJob::read(block)?),
                None => None,
            },
            id,
        })
    }

    /// What is done, in percent; 100 where there is nothing to do.
    pub(super) fn percent(&self) -> u64 {
        match self.total {
            0 => 100,
            total => u64::try_from(u128::from(self.current) * 100 / u128::from(total))
                .map_or(100, |percent| percent.min(100)),
        }
    }

    /// Its work is over, well or not.
    pub(super) fn is_over(&self) -> bool {
        matches!(&*self.status, "concluded" | "null")
    }

    /// `failed` or `nospace` while an I/O error holds it up.
    pub(super) fn stopped_by(&self) -> Option<&str> {
        let block = self.block.as_ref()?;
        let stopped = block.paused && block.io_status != "ok";
        stopped.then_some(&*block.io_status)
    }

    pub(super) fn to_json(&self) -> Value {
        let mut value = json!({
            "id": self.id,
            "type": self.kind,
            "status": self.status,
            "current-progress": self.current,
            "total-progress": self.total,
            "percent": self.percent(),
        });
        if let Some(block) = &self.block {
            value["speed"] = block.speed.into();
            value["paused"] = block.paused.into();
            value["io-status"] = block.io_status.as_str().into();
        }
        if let Some(error) = &self.error {
            value["error"] = error.as_str().into();
        }
        value
    }

    /// Columns of a list: id, kind, status, percent, bytes, remarks.
    pub(super) fn cells(&self) -> [String; 6] {
        let bytes = match self.total {
            0 => "-".to_string(),
            total => format!("{} of {}", human(self.current), human(total)),
        };
        [
            self.id.clone(),
            self.kind.clone(),
            self.status.clone(),
            format!("{} %", self.percent()),
            bytes,
            self.remarks(),
        ]
    }

    fn remarks(&self) -> String {
        let mut remarks = Vec::new();
        if let Some(why) = self.stopped_by() {
            remarks.push(match why {
                "nospace" => "stopped: no space left".to_string(),
                _ => "stopped by an I/O error".to_string(),
            });
        }
        if let Some(block) = self.block.as_ref().filter(|block| block.speed > 0) {
            remarks.push(format!("at most {}/s", human(block.speed)));
        }
        remarks.extend(self.error.clone());
        remarks.join(", ")
    }
}

impl BlockJob {
    fn read(job: &Value) -> Option<BlockJob> {
        Some(BlockJob {
            speed: job.get("speed")?.as_u64()?,
            paused: job.get("paused")?.as_bool()?,
            io_status: job.get("io-status")?.as_str()?.to_string(),
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::cli) fn job(id: &str, status: &str, current: u64, total: u64) -> JobView {
        JobView {
            id: id.into(),
            kind: "commit".into(),
            status: status.into(),
            current,
            total,
            error: None,
            block: Some(BlockJob {
                speed: 0,
                paused: false,
                io_status: "ok".into(),
            }),
        }
    }

    #[test]
    fn both_lists_are_one_and_the_oldest_job_comes_first() {
        let jobs = json!([
            {"id": "new", "type": "create", "status": "running", "current-progress": 0, "total-progress": 1},
            {"id": "old", "type": "stream", "status": "paused", "current-progress": 1, "total-progress": 4},
        ]);
        let block_jobs = json!([
            {"device": "old", "speed": 1024, "paused": true, "io-status": "nospace"},
        ]);
        let views = read(&jobs, &block_jobs).unwrap();
        assert_eq!(views[0].id, "old");
        assert_eq!(views[0].percent(), 25);
        assert_eq!(
            views[0].cells()[5],
            "stopped: no space left, at most 1 KiB/s"
        );
        assert_eq!(views[1].block, None);
        assert_eq!(views[1].to_json().get("speed"), None);
        assert!(read(&json!([{"id": 1}]), &json!([])).is_none());
    }

    #[test]
    fn progress_beyond_its_end_is_still_a_percentage() {
        assert_eq!(job("j", "running", 0, 0).percent(), 100);
        assert_eq!(job("j", "running", u64::MAX, u64::MAX).percent(), 100);
        assert_eq!(job("j", "running", 5, 4).percent(), 100);
    }
}
