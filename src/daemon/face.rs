//! What differs between the daemon proper and a program that serves in its place.

use std::process::ExitCode;

use serde_json::Value;

use super::command_line::Item;
use crate::qmp::error::QmpError;

/// How the daemon shows itself.
pub struct Face {
    program: &'static str,
    /// Messages say which option they are about.
    names_options: bool,
    ready: Option<Ready>,
}

/// Tells what there is, given the answer of `query-block-exports`; an error stops the daemon again.
type Ready = Box<dyn FnOnce(&Value) -> Result<(), String>>;

impl Face {
    /// Of a program whose command line is the daemon's.
    pub(super) fn of_daemon(program: &'static str) -> Face {
        Face {
            program,
            names_options: true,
            ready: None,
        }
    }

    /// Of a program with a command line of its own; `ready` is called once, when everything is set up.
    pub fn new(
        program: &'static str,
        ready: impl FnOnce(&Value) -> Result<(), String> + 'static,
    ) -> Face {
        Face {
            program,
            names_options: false,
            ready: Some(Box::new(ready)),
        }
    }

    pub(super) fn fail(&self, text: &str) -> ExitCode {
        eprintln!("{}: {text}", self.program);
        ExitCode::FAILURE
    }

    /// What to say of an option that could not be carried out.
    pub(super) fn about(&self, item: &Item, error: &QmpError) -> String {
        match self.names_options {
            true => format!("{}: {error}", item.place()),
            false => error.to_string(),
        }
    }

    pub(super) fn announce(&mut self, exports: &Value) -> Result<(), String> {
        match self.ready.take() {
            Some(ready) => ready(exports),
            None => Ok(()),
        }
    }
}
