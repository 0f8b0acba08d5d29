//! Every way in which a call can go wrong, and the gRPC code of each. Causes are logged here, once, and never shown.

use platform::{
    error::{Code, Detail, Fault, Violation},
    pg::{self, Failure},
    state_log::DATABASE,
};

/// What a call can come to instead of an answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is not as it must be.
    #[error("invalid request")]
    Invalid(Vec<Violation>),
    /// More messages than a caller without pages is given.
    #[error("the period holds more than {limit} messages")]
    HistoryTooLong {
        /// The most that is given whole.
        limit: i64,
    },
    /// The database is away, or refused a statement.
    #[error("database")]
    Database(#[from] sqlx::Error),
}

impl Error {
    /// The code that the caller gets.
    pub fn code(&self) -> Code {
        match self {
            Error::Invalid(_) => Code::InvalidArgument,
            Error::HistoryTooLong { .. } => Code::OutOfRange,
            Error::Database(cause) => match pg::classify(cause) {
                Failure::Away | Failure::Retry => Code::Unavailable,
                Failure::Data | Failure::Bug => Code::Internal,
            },
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        let code = error.code();
        match error {
            Error::Invalid(violations) => Fault::invalid(violations),
            Error::HistoryTooLong { limit } => Fault {
                code,
                message: format!(
                    "the period holds more than {limit} messages: ask for pages with page_size"
                ),
                detail: Detail::Reason {
                    reason: "HISTORY_TOO_LONG",
                    metadata: vec![("limit".to_owned(), limit.to_string())],
                },
            },
            Error::Database(cause) if code == Code::Unavailable => {
                DATABASE.failed(&cause);
                Fault::new(code, "the history cannot be read now, try again")
            }
            Error::Database(cause) => {
                tracing::error!(error = %cause, "database refused a statement");
                Fault::new(code, "internal error")
            }
        }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> tonic::Status {
        Fault::from(error).into()
    }
}
