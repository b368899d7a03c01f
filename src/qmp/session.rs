//! One client's conversation: bytes in, requests and immediate answers out. No I/O, no clock.
//!
//! The session greets, negotiates, checks the shape of requests and their arguments, and answers by
//! itself what needs nobody else (all errors up to there, `qmp_capabilities`). What is left is a
//! [`Request`] for a command that exists. Answers come in the order of the requests: none of the
//! commands may run out of band.

use serde_json::{Map, Value, json};

use super::error::{ErrorClass, QmpError};
use super::json::Reader;
use super::schema::{self, Command, Dialect};

/// The conversation with one client.
#[derive(Debug, Default)]
pub struct Session {
    reader: Reader,
    negotiated: bool,
    oob: bool,
}

/// What to do next for a client.
#[derive(Debug)]
pub enum Step {
    /// Send this.
    Answer(Value),
    /// Run this command, then send [`Answer::reply`].
    Run(Request),
}

/// A command to run; its arguments are checked.
#[derive(Debug)]
pub struct Request {
    /// Which command.
    pub command: &'static Command,
    /// Its arguments, an object.
    pub arguments: Value,
    id: Option<Value>,
}

impl Session {
    /// What the server says when a client connects.
    pub fn greeting(version: Value) -> Value {
        json!({"QMP": {"version": version, "capabilities": ["oob"]}})
    }

    /// Takes bytes from the client.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.reader.feed(bytes);
    }

    /// Whether events may be sent: the client has negotiated.
    pub fn wants_events(&self) -> bool {
        self.negotiated
    }

    /// Whether input was received that [`Session::next_step`] has not dealt with.
    pub fn has_input(&self) -> bool {
        self.reader.waiting() > 0
    }

    /// The next thing to do, in the order of the input.
    pub fn next_step(&mut self) -> Option<Step> {
        let message = self.reader.next_message()?;
        let step = match message {
            Err(error) => Step::Answer(answer(Err(error.into()), None)),
            Ok(Value::Object(mut members)) => {
                let id = members.shift_remove("id");
                match self.request(members) {
                    Ok(Some((command, arguments))) => Step::Run(Request {
                        command,
                        arguments,
                        id,
                    }),
                    Ok(None) => Step::Answer(answer(Ok(json!({})), id)),
                    Err(error) => Step::Answer(answer(Err(error), id)),
                }
            }
            Ok(_) => {
                let error = QmpError::generic("QMP input must be a JSON object");
                Step::Answer(answer(Err(error), None))
            }
        };
        Some(step)
    }

    /// The command to run with its arguments; none if the session itself has done what was asked.
    fn request(
        &mut self,
        members: Map<String, Value>,
    ) -> Result<Option<(&'static Command, Value)>, QmpError> {
        let call = Call::read(members, self.oob)?;
        let negotiation = call.name == "qmp_capabilities";
        if !self.negotiated && !negotiation {
            let text = "Expecting capabilities negotiation with 'qmp_capabilities'";
            return Err(QmpError::new(ErrorClass::CommandNotFound, text));
        }
        let command = schema::command(&call.name).ok_or_else(|| not_found(&call.name))?;
        if call.out_of_band {
            let text = format!("The command {} does not support OOB", call.name);
            return Err(QmpError::generic(text));
        }
        let arguments = schema::check(command.args, call.arguments, Dialect::Json)?;
        if negotiation {
            return self.negotiate(&arguments).map(|()| None);
        }
        Ok(Some((command, arguments)))
    }

    fn negotiate(&mut self, arguments: &Value) -> Result<(), QmpError> {
        if self.negotiated {
            let text = "Capabilities negotiation is already complete, command ignored";
            return Err(QmpError::new(ErrorClass::CommandNotFound, text));
        }
        let enable = schema::Args::new(arguments)
            .array("enable")
            .unwrap_or_default();
        self.oob = enable.iter().any(|capability| capability == "oob");
        self.negotiated = true;
        Ok(())
    }
}

impl Request {
    /// The command's name, its arguments, and what makes the reply.
    pub fn into_parts(self) -> (&'static str, Value, Answer) {
        (self.command.name, self.arguments, Answer { id: self.id })
    }
}

/// Makes the reply to a request.
#[derive(Debug)]
pub struct Answer {
    id: Option<Value>,
}

impl Answer {
    /// The reply with this result.
    pub fn reply(self, result: Result<Value, QmpError>) -> Value {
        answer(result, self.id)
    }
}

/// The members of a request.
struct Call {
    name: String,
    arguments: Value,
    out_of_band: bool,
}

impl Call {
    fn read(members: Map<String, Value>, oob: bool) -> Result<Call, QmpError> {
        let mut name = None;
        let mut arguments = json!({});
        for (member, value) in members {
            match (member.as_str(), value) {
                ("exec-oob", _) if !oob => return Err(bad_member(&member, "is unexpected")),
                ("execute" | "exec-oob", Value::String(_)) if name.is_some() => {
                    return Err(bad_member("execute", "clashes with 'exec-oob'"));
                }
                ("execute", Value::String(command)) => name = Some((command, false)),
                ("exec-oob", Value::String(command)) => name = Some((command, true)),
                ("execute" | "exec-oob", _) => {
                    return Err(bad_member(&member, "must be a string"));
                }
                ("arguments", Value::Object(members)) => arguments = Value::Object(members),
                ("arguments", _) => return Err(bad_member(&member, "must be an object")),
                _ => return Err(bad_member(&member, "is unexpected")),
            }
        }
        match name {
            Some((name, out_of_band)) => Ok(Call {
                name,
                arguments,
                out_of_band,
            }),
            None => Err(QmpError::generic("QMP input lacks member 'execute'")),
        }
    }
}

fn bad_member(name: &str, what: &str) -> QmpError {
    QmpError::generic(format!("QMP input member '{name}' {what}"))
}

fn not_found(name: &str) -> QmpError {
    let text = format!("The command {name} has not been found");
    QmpError::new(ErrorClass::CommandNotFound, text)
}

fn answer(result: Result<Value, QmpError>, id: Option<Value>) -> Value {
    let mut reply = match result {
        Ok(value) => json!({"return": value}),
        Err(error) => json!({"error": error.to_value()}),
    };
    if let Some(id) = id {
        reply["id"] = id;
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers as the daemon would where no block layer is needed: no jobs, a version, nothing else.
    fn run(session: &mut Session, bytes: &[u8]) -> Vec<Value> {
        session.receive(bytes);
        let mut answers = Vec::new();
        while let Some(step) = session.next_step() {
            answers.push(match step {
                Step::Answer(answer) => answer,
                Step::Run(request) => {
                    let (name, _, answer) = request.into_parts();
                    let result = match name {
                        "query-version" => Ok(json!({
                            "qemu": {"micro": 2, "minor": 0, "major": 10},
                            "package": "Debian 1:10.0.2+ds-2+deb13u1~bpo12+1"
                        })),
                        "query-jobs" => Ok(json!([])),
                        "quit" => Ok(json!({})),
                        other => panic!("{other} got past the checks"),
                    };
                    answer.reply(result)
                }
            });
        }
        answers
    }

    fn negotiated() -> Session {
        let mut session = Session::default();
        assert_eq!(
            run(&mut session, b"{'execute': 'qmp_capabilities'}"),
            [json!({"return": {}})]
        );
        session
    }

    #[test]
    fn events_wait_for_negotiation() {
        assert!(!Session::default().wants_events());
        assert!(negotiated().wants_events());
    }

    #[test]
    fn the_id_is_echoed_whatever_it_is() {
        for id in [
            json!(null),
            json!([1]),
            json!({"a": 1}),
            json!("x"),
            json!(0),
        ] {
            let request = json!({"execute": "query-jobs", "id": id}).to_string();
            let answers = run(&mut negotiated(), request.as_bytes());
            assert_eq!(answers, [json!({"return": [], "id": id})]);
        }
    }

    #[test]
    fn an_unfinished_message_waits() {
        let mut session = negotiated();
        assert!(run(&mut session, b"{'execute': 'query-").is_empty());
        assert_eq!(run(&mut session, b"jobs'}"), [json!({"return": []})]);
    }

    #[test]
    fn exec_oob_is_unknown_until_enabled() {
        let mut session = Session::default();
        let enable = br#"{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}"#;
        run(&mut session, enable);
        let answers = run(&mut session, br#"{"exec-oob": "query-version", "id": 1}"#);
        let desc = "The command query-version does not support OOB";
        assert_eq!(answers[0]["error"]["desc"], desc);
        assert_eq!(answers[0]["id"], 1);
        let answers = run(&mut negotiated(), br#"{"exec-oob": "query-version"}"#);
        let desc = "QMP input member 'exec-oob' is unexpected";
        assert_eq!(answers[0]["error"]["desc"], desc);
    }

    /// QEMU's answers, recorded; see the file for where they come from.
    #[test]
    fn recorded_exchanges_are_answered_alike() {
        for recording in [
            include_str!("testdata/errors-protocol.jsonl"),
            include_str!("testdata/oob.jsonl"),
        ] {
            let mut session = Session::default();
            let mut answers = std::collections::VecDeque::<Value>::new();
            for line in recording.lines() {
                let line: Value = serde_json::from_str(line).unwrap();
                match line["dir"].as_str().unwrap() {
                    "->" => {
                        assert!(answers.is_empty(), "{answers:?} left before {line}");
                        answers.extend(run(&mut session, &sent_bytes(&line)));
                    }
                    "<-" if line["msg"].get("QMP").is_none() => {
                        let answer = answers.pop_front().unwrap();
                        if !is_of_a_later_issue(&answer) {
                            assert_eq!(answer, line["msg"]);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Commands that the recordings use and that are not there yet.
    fn is_of_a_later_issue(answer: &Value) -> bool {
        let missing = [
            "block-job-set-speed",
            "block-stream",
            "transaction",
            "block-dirty-bitmap-add",
        ];
        let desc = answer["error"]["desc"].as_str().unwrap_or_default();
        missing
            .iter()
            .any(|name| desc == format!("The command {name} has not been found"))
    }

    fn sent_bytes(line: &Value) -> Vec<u8> {
        if let Some(message) = line.get("msg") {
            return format!("{message}\n").into_bytes();
        }
        match line["raw"].as_str().unwrap() {
            // The recorder's spelling of a byte that is no text.
            "{\"execute\": \"query-ver<0xff>\\n" => b"{\"execute\": \"query-ver\xff\n".to_vec(),
            text => text.as_bytes().to_vec(),
        }
    }
}
