//! A QMP client that waits for each answer.

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use serde_json::de::{IoRead, StreamDeserializer};
use serde_json::{Deserializer, Map, Value, json};

use crate::error::{Error, ErrorKind, Result};

/// How long a monitor may take to greet: one that serves another client does not.
const GREETING: Duration = Duration::from_secs(10);

type Messages = StreamDeserializer<'static, IoRead<BufReader<UnixStream>>, Value>;

/// A connection that has left capabilities negotiation behind.
pub(super) struct QmpClient {
    socket: UnixStream,
    messages: Messages,
    name: String,
}

impl QmpClient {
    /// Connects and negotiates.
    ///
    /// # Errors
    /// Nobody listens, or who listens does not speak QMP.
    pub(super) fn connect(path: &Path) -> Result<QmpClient> {
        let client = QmpClient::connect_within(path, GREETING)?;
        client.socket.set_read_timeout(None)?;
        Ok(client)
    }

    /// Connects and negotiates; no answer may take longer than `limit`, now or later.
    ///
    /// # Errors
    /// As [`QmpClient::connect`]; `ETIMEDOUT` where another client is served.
    pub(super) fn connect_within(path: &Path, limit: Duration) -> Result<QmpClient> {
        let name = path.display().to_string();
        let socket = UnixStream::connect(path)
            .map_err(|error| sys(&error, &format!("cannot connect to '{name}'")))?;
        socket.set_read_timeout(Some(limit))?;
        let mut client = QmpClient::over(socket, name)?;
        client.negotiate()?;
        Ok(client)
    }

    fn over(socket: UnixStream, name: String) -> Result<QmpClient> {
        let messages = Deserializer::from_reader(BufReader::new(socket.try_clone()?)).into_iter();
        Ok(QmpClient {
            socket,
            messages,
            name,
        })
    }

    fn negotiate(&mut self) -> Result<()> {
        let greeting = self.message()?;
        if greeting.get("QMP").is_none() {
            return Err(self.broken("no QMP greeting"));
        }
        self.execute("qmp_capabilities", Map::new())?;
        Ok(())
    }

    /// Runs a command and gives its result; events that come in between are dropped.
    ///
    /// # Errors
    /// The command failed (the message is `CLASS: DESC`, without the class `GenericError`), or the
    /// connection broke.
    pub(super) fn execute(
        &mut self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> Result<Value> {
        let mut request = json!({"execute": command});
        if !arguments.is_empty() {
            request["arguments"] = Value::Object(arguments);
        }
        self.send(&request)?;
        loop {
            let mut message = self.message()?;
            if let Some(result) = message.get_mut("return") {
                return Ok(result.take());
            }
            if let Some(error) = message.get("error") {
                return Err(refused(error));
            }
            if message.get("event").is_none() {
                return Err(self.broken("a message that is no reply"));
            }
        }
    }

    /// Sends in one piece: `quit` may close the socket as soon as its last brace is read.
    fn send(&mut self, request: &Value) -> Result<()> {
        let line = format!("{request}\n");
        let sent = self.socket.write_all(line.as_bytes());
        sent.map_err(|error| self.io(&error))
    }

    fn message(&mut self) -> Result<Value> {
        match self.messages.next() {
            Some(Ok(message)) => Ok(message),
            Some(Err(error)) if error.is_io() => Err(self.io(&error.into())),
            Some(Err(error)) => Err(self.broken(&error.to_string())),
            None => Err(self.broken("the connection was closed")),
        }
    }

    fn io(&self, error: &io::Error) -> Error {
        match error.kind() {
            io::ErrorKind::WouldBlock => {
                let text = "no answer in time; is another client connected?";
                let text = format!("control socket '{}': {text}", self.name);
                Error::new(ErrorKind::Io(Errno::ETIMEDOUT), text)
            }
            _ => sys(error, &format!("control socket '{}'", self.name)),
        }
    }

    fn broken(&self, what: &str) -> Error {
        let text = format!("control socket '{}': {what}", self.name);
        Error::new(ErrorKind::Io(Errno::EPROTO), text)
    }
}

fn sys(error: &io::Error, what: &str) -> Error {
    match error.raw_os_error() {
        Some(errno) => Error::sys(Errno::from_raw(errno), what),
        None => Error::new(ErrorKind::Io(Errno::EIO), format!("{what}: {error}")),
    }
}

/// The `error` of a reply.
fn refused(error: &Value) -> Error {
    let member = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
    let (class, desc) = (member("class"), member("desc"));
    let text = match class {
        "GenericError" => desc.to_string(),
        class => format!("{class}: {desc}"),
    };
    Error::new(ErrorKind::InvalidArgument, text)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use super::*;

    const GREETED: &str = "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\n";

    /// Plays a server that greets and gives each answer for one line; tells what it was sent.
    fn conversation(
        greeting: &'static str,
        answers: &[&'static str],
    ) -> (Result<Value>, Vec<String>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let answers = answers.to_vec();
        let server = thread::spawn(move || {
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            (&theirs).write_all(greeting.as_bytes()).unwrap();
            let mut sent = Vec::new();
            for answer in answers {
                sent.push(lines.next().unwrap().unwrap());
                (&theirs).write_all(answer.as_bytes()).unwrap();
            }
            sent
        });
        let mut client = QmpClient::over(ours, "s".into()).unwrap();
        let arguments = Map::from_iter([("a".to_string(), json!(1))]);
        let result = client
            .negotiate()
            .and_then(|()| client.execute("do", arguments));
        drop(client);
        (result, server.join().unwrap())
    }

    #[test]
    fn negotiates_skips_events_and_reads_pretty_replies() {
        let event = "{\"event\": \"X\", \"timestamp\": {}}\n{\n  \"return\":\n 7}\n";
        let (result, sent) = conversation(GREETED, &["{\"return\": {}}", event]);
        assert_eq!(result.unwrap(), json!(7));
        let wanted = [
            "{\"execute\":\"qmp_capabilities\"}",
            "{\"execute\":\"do\",\"arguments\":{\"a\":1}}",
        ];
        assert_eq!(sent, wanted);
    }

    #[test]
    fn errors_of_special_classes_show_the_class() {
        let answer = "{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"no\"}}";
        let (result, _) = conversation(GREETED, &["{\"return\": {}}", answer]);
        assert_eq!(result.unwrap_err().message(), "CommandNotFound: no");
        let answer = "{\"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}";
        let (result, _) = conversation(GREETED, &["{\"return\": {}}", answer]);
        assert_eq!(result.unwrap_err().message(), "no");
    }

    #[test]
    fn who_does_not_speak_qmp_is_told_so() {
        for (greeting, answers, wanted) in [
            (
                "SSH-2.0\n",
                &[][..],
                "control socket 's': expected value at line 1 column 1",
            ),
            ("{}\n", &[], "control socket 's': no QMP greeting"),
            ("", &[], "control socket 's': the connection was closed"),
            (
                GREETED,
                &["{\"hello\": 1}"],
                "control socket 's': a message that is no reply",
            ),
        ] {
            let (result, _) = conversation(greeting, answers);
            assert_eq!(result.unwrap_err().message(), wanted, "{greeting}");
        }
    }
}
