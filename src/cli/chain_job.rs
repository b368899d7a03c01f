//! `liveblk stream` and `liveblk commit`: jobs that shorten a chain; and what starting any job takes.

use std::fs::canonicalize;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

use super::args::{EndpointArguments, Output};
use super::chain::{Chain, Layer, State};
use super::job_args::{ChainJobArguments, CommitArguments, StreamArguments};
use super::job_wait::{Goal, Wait};
use super::qmp_client::QmpClient;
use super::snapshot::only_exported;
use super::{Outcome, endpoint};

pub(super) fn stream(arguments: &StreamArguments) -> Result<Outcome> {
    let common = &arguments.job;
    let mut started = Started::connect(common)?;
    let chain = started.chain(arguments.target.as_deref())?;
    let node = &chain.layers[0].node_name;
    let mut members = members(common, node);
    add_backing_file(&mut members, arguments.backing_file.as_deref())?;
    if let Some(base) = &arguments.base {
        let base = layer(&chain, base)?;
        members.insert("base-node".to_string(), base.node_name.as_str().into());
    }
    started.start("block-stream", "stream", members)?;
    started.finish(common.wait.then_some(Goal::End))
}

pub(super) fn commit(arguments: &CommitArguments) -> Result<Outcome> {
    let common = &arguments.job;
    let mut started = Started::connect(common)?;
    let chain = started.chain(arguments.target.as_deref())?;
    let device = &chain.layers[0].node_name;
    let top = match &arguments.top {
        Some(top) => &layer(&chain, top)?.node_name,
        None => device,
    };
    let is_active = top == device;
    if !is_active && arguments.no_complete {
        let text = format!(
            "'{top}' is not the active layer: its commit ends by itself, without --no-complete"
        );
        return Err(Error::refused(text));
    }
    if !is_active && arguments.copy_mode.is_some() {
        let text = format!(
            "'{top}' is not the active layer: nobody writes to it, and there is no --copy-mode"
        );
        return Err(Error::refused(text));
    }
    let mut members = members(common, device);
    add_backing_file(&mut members, arguments.backing_file.as_deref())?;
    members.insert("top-node".to_string(), top.as_str().into());
    if let Some(base) = &arguments.base {
        let base = layer(&chain, base)?;
        members.insert("base-node".to_string(), base.node_name.as_str().into());
    }
    if let Some(mode) = arguments.copy_mode {
        members.insert("copy-mode".to_string(), mode.name().into());
    }
    let was_exported = started.exports(device);
    started.start("block-commit", "commit", members)?;
    let goal = match (is_active, arguments.no_complete) {
        (true, true) => Some(Goal::EndOrReady),
        (true, false) => Some(Goal::Completed),
        (false, _) => common.wait.then_some(Goal::End),
    };
    let outcome = started.finish(goal)?;
    if goal == Some(Goal::Completed) && outcome.status == 0 && was_exported {
        check_pivoted(common, device)?;
    }
    Ok(outcome)
}

/// Somebody may have cancelled the job after it was told to complete.
pub(super) fn check_pivoted(arguments: &ChainJobArguments, device: &str) -> Result<()> {
    let started = Started::connect(arguments)?;
    if !started.exports(device) {
        return Ok(());
    }
    let words = arguments.endpoint.words();
    let text = format!(
        "the job has ended, but '{device}' is still the active layer: it was cancelled meanwhile, or an \
         overlay was put on it; see 'liveblk chain{words}'"
    );
    Err(Error::new(ErrorKind::Cancelled, text))
}

/// The arguments that all kinds of jobs have.
fn members(arguments: &ChainJobArguments, node: &str) -> Map<String, Value> {
    let mut members = common(arguments, node);
    if let Some(policy) = arguments.on_error {
        members.insert("on-error".to_string(), policy.name().into());
    }
    members
}

/// As [`members`], without what is done about errors.
pub(super) fn common(arguments: &ChainJobArguments, node: &str) -> Map<String, Value> {
    let mut members = Map::new();
    let mut add = |name: &str, value: Value| members.insert(name.to_string(), value);
    add("device", node.into());
    // Whoever waits, now or later, is told how it has ended.
    add("auto-dismiss", false.into());
    if let Some(speed) = arguments.speed {
        add("speed", speed.into());
    }
    members
}

fn add_backing_file(members: &mut Map<String, Value>, file: Option<&Path>) -> Result<()> {
    if let Some(file) = file {
        members.insert("backing-file".to_string(), text_of(file)?.into());
    }
    Ok(())
}

/// A file's name for QMP.
pub(super) fn text_of(file: &Path) -> Result<&str> {
    file.to_str().ok_or_else(|| {
        let name = file.display();
        Error::refused(format!(
            "'{name}': QMP cannot carry a name that is not UTF-8"
        ))
    })
}

/// A job that is being started.
pub(super) struct Started<'a> {
    pub(super) client: QmpClient,
    arguments: &'a ChainJobArguments,
    pub(super) state: State,
    id: String,
}

impl Started<'_> {
    pub(super) fn connect(arguments: &ChainJobArguments) -> Result<Started<'_>> {
        let mut client = QmpClient::connect(&endpoint::find(&arguments.endpoint)?)?;
        let state = State::query(&mut client)?;
        Ok(Started {
            client,
            arguments,
            state,
            id: String::new(),
        })
    }

    /// The chain that is meant; its first layer is the node itself, never a job's filter.
    pub(super) fn chain(&self, target: Option<&str>) -> Result<Chain> {
        let node = match target {
            Some(target) => self.state.node_of(target),
            None => only_exported(&self.state)?,
        };
        let mut chains = self
            .state
            .chains(std::slice::from_ref(&node))
            .map_err(|error| {
                let words = self.arguments.endpoint.words();
                let advice = format!("'liveblk chain{words}' shows the nodes there are");
                Error::new(error.kind(), format!("{}; {advice}", error.message()))
            })?;
        let chain = chains.pop().filter(|chain| !chain.layers.is_empty());
        chain.ok_or_else(|| Error::refused(format!("'{node}' is no image")))
    }

    pub(super) fn exports(&self, node: &str) -> bool {
        self.state
            .exported()
            .iter()
            .any(|exported| exported == node)
    }

    /// Whether a node has a dirty bitmap of this name.
    pub(super) fn has_bitmap(&mut self, node: &str, bitmap: &str) -> Result<bool> {
        let flat = Map::from_iter([("flat".to_string(), true.into())]);
        let nodes = self.client.execute("query-named-block-nodes", flat)?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let node = nodes.find(|found| found["node-name"] == node);
        let bitmaps = node.and_then(|node| node["dirty-bitmaps"].as_array());
        let mut bitmaps = bitmaps.into_iter().flatten();
        Ok(bitmaps.any(|found| found["name"] == bitmap))
    }

    pub(super) fn start(
        &mut self,
        command: &str,
        kind: &str,
        members: Map<String, Value>,
    ) -> Result<()> {
        self.start_by(command, kind, |id| {
            let mut members = members.clone();
            members.insert("job-id".to_string(), id.into());
            members
        })
    }

    /// As [`Started::start`], where `members` puts the job's id in its place.
    pub(super) fn start_by(
        &mut self,
        command: &str,
        kind: &str,
        members: impl Fn(&str) -> Map<String, Value>,
    ) -> Result<()> {
        let mut number = 0;
        loop {
            let id = match &self.arguments.job_id {
                Some(id) => id.clone(),
                None => format!("{kind}{number}"),
            };
            let answer = self.client.execute(command, members(&id));
            let taken = format!("Job ID '{id}' already in use");
            self.id = id;
            match answer {
                Ok(_) => return Ok(()),
                Err(error) if self.arguments.job_id.is_none() && error.message() == taken => {
                    number += 1;
                }
                Err(error) => return Err(advise(error, &self.arguments.endpoint)),
            }
        }
    }

    /// Lets go of the socket, and waits if that is wanted.
    pub(super) fn finish(self, goal: Option<Goal>) -> Result<Outcome> {
        let Started {
            client,
            arguments,
            id,
            ..
        } = self;
        drop(client);
        let Some(goal) = goal else {
            return Ok(Outcome::text(match arguments.output {
                Output::Human => format!("{id}\n"),
                Output::Json => format!("{:#}\n", json!({"id": id})),
            }));
        };
        let wait = Wait {
            socket: &endpoint::find(&arguments.endpoint)?,
            endpoint: &arguments.endpoint,
            id: &id,
            goal,
            output: arguments.output,
        };
        wait.run()
    }
}

/// The layer that is meant by a node-name, the name of a file as the chain shows it, another name of the
/// same file, or the last part of its name.
fn layer<'a>(chain: &'a Chain, text: &str) -> Result<&'a Layer> {
    let layers = &chain.layers;
    let by_name = layers.iter().find(|layer| layer.node_name == text);
    if let Some(found) = by_name.or_else(|| layers.iter().find(|layer| layer.file == text)) {
        return Ok(found);
    }
    let same = |layer: &&Layer| {
        let (one, other) = (canonicalize(text), canonicalize(&layer.file));
        one.is_ok_and(|one| other.is_ok_and(|other| one == other))
    };
    if let Some(found) = layers.iter().find(same) {
        return Ok(found);
    }
    let last = |layer: &&Layer| Path::new(&layer.file).file_name() == Some(text.as_ref());
    let mut found = layers.iter().filter(last);
    match (found.next(), found.next()) {
        (Some(layer), None) => Ok(layer),
        (Some(_), Some(_)) => Err(Error::refused(format!(
            "several files of the chain are called '{text}': give the node-name"
        ))),
        (None, _) => {
            let layers: Vec<String> = layers
                .iter()
                .map(|layer| format!("{} ({})", layer.node_name, layer.file))
                .collect();
            Err(Error::refused(format!(
                "'{text}' is neither a node nor a file of the chain, which is: {}",
                layers.join(", ")
            )))
        }
    }
}

/// The refusal, and what to do next.
fn advise(error: Error, arguments: &EndpointArguments) -> Error {
    let (message, words) = (error.message(), arguments.words());
    let advice = if message.contains("already in use") {
        format!(
            "choose another --job-id, or forget that job: 'liveblk job dismiss{words}' if it has ended"
        )
    } else if message.contains("in use by block job") || message.contains("root block node") {
        format!(
            "'liveblk jobs{words}' shows the jobs, of which one may be working there: wait for it or cancel it"
        )
    } else if message.contains("is also the backing file of") {
        "stream that overlay first, so that it stands alone, or remove it".to_string()
    } else if message.contains("'backing-file' specified") {
        "leave out --backing-file: no header changes".to_string()
    } else if message.contains("backing file specified, but") {
        "give --base, or leave out --backing-file".to_string()
    } else {
        return error;
    };
    Error::new(error.kind(), format!("{message}; {advice}"))
}

#[cfg(test)]
mod tests {
    use super::super::chain::tests::{exported, three_layers};
    use super::*;

    #[test]
    fn a_layer_may_be_named_by_its_node_or_its_file() {
        let chain = three_layers(exported()).chains(&[]).unwrap().remove(0);
        for text in ["node-A", "./a.raw", "a.raw"] {
            assert_eq!(layer(&chain, text).unwrap().node_name, "node-A", "{text}");
        }
        let error = layer(&chain, "x").unwrap_err();
        assert!(
            error
                .message()
                .ends_with("which is: node-C (c.qcow2), node-B (b.qcow2), node-A (./a.raw)"),
            "{error}"
        );
    }

    #[test]
    fn refusals_say_what_to_do_next() {
        let endpoint = EndpointArguments {
            name: None,
            socket: None,
        };
        let advised = |message: &str| {
            let error = Error::new(ErrorKind::InvalidArgument, message);
            advise(error, &endpoint).message().to_string()
        };
        let busy = "Node 'd' is busy: block device is in use by block job: stream";
        assert!(advised(busy).ends_with("wait for it or cancel it"));
        assert!(advised("Job ID 'j' already in use").contains("choose another --job-id"));
        assert_eq!(advised("something else"), "something else");
    }
}
