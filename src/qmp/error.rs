//! The error half of a QMP reply.

use std::fmt;

use serde_json::{Value, json};

use crate::error::Error;

use super::json::JsonError;

/// The classes a QMP error may have; clients act on them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// Everything without a class of its own.
    GenericError,
    /// The command does not exist, or not in the present mode.
    CommandNotFound,
    /// A job command names no job.
    DeviceNotActive,
    /// A device does not exist (`block-commit` only).
    DeviceNotFound,
}

impl ErrorClass {
    /// The class as it stands in a reply.
    pub fn name(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::CommandNotFound => "CommandNotFound",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::DeviceNotFound => "DeviceNotFound",
        }
    }
}

/// An error as QMP reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpError {
    /// What programs act on.
    pub class: ErrorClass,
    /// What people read.
    pub desc: String,
}

impl QmpError {
    /// An error of this class.
    pub fn new(class: ErrorClass, desc: impl Into<String>) -> QmpError {
        QmpError {
            class,
            desc: desc.into(),
        }
    }

    /// An error of the class `GenericError`.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError::new(ErrorClass::GenericError, desc)
    }

    /// The value of the reply's member `error`.
    pub fn to_value(&self) -> Value {
        json!({"class": self.class.name(), "desc": self.desc})
    }
}

impl fmt::Display for QmpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.desc)
    }
}

impl std::error::Error for QmpError {}

impl From<Error> for QmpError {
    /// No kind of error has a class of its own: the special classes belong to commands, which make
    /// such errors themselves.
    fn from(error: Error) -> QmpError {
        QmpError::generic(error.message())
    }
}

impl From<JsonError> for QmpError {
    fn from(error: JsonError) -> QmpError {
        QmpError::generic(error.0)
    }
}
