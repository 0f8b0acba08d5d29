//! The one error between a store and a use case. It says what failed for the one who must react: whether anything can have
//! been written, whether the same again may pass, and whether somebody has to look.

use std::{fmt, sync::OnceLock};

use prometheus::IntCounter;

use crate::{
    error::Code,
    grpc::registered,
    state_log::{self, StateLog},
};

static LOCKED: StateLog = StateLog::new(
    "rows are locked by another transaction",
    "rows are free again",
);
static EXHAUSTED: StateLog =
    StateLog::new("every connection is in use", "connections are free again");

/// Of the service that this process is.
static BROKEN_INVARIANTS: OnceLock<IntCounter> = OnceLock::new();

/// Shows what is counted before there is anything to count.
pub(super) fn show_metrics(service: &str) {
    BROKEN_INVARIANTS.get_or_init(|| {
        registered(IntCounter::new(
            format!("{service}_counter_broken_invariants_total"),
            "Times that rows were found as no transaction leaves them.",
        ))
    });
}

/// What a failure means. `Copy`, so that one failure can answer every caller of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// There is no connection, or its BEGIN failed: nothing was written.
    NotConnected,
    /// Every connection is in use for longer than a caller may wait: nothing was written.
    Exhausted,
    /// The connection broke, or said nothing in its time: what became of a commit is unknown.
    Lost,
    /// The server takes no writes: read-only (25006) or in recovery. Nothing was written.
    ReadOnly,
    /// A row stayed locked for longer than `lock_timeout` (55P03): nothing was written.
    Locked,
    /// A statement took longer than `statement_timeout` (57014): nothing was written.
    TimedOut,
    /// A deadlock or a serialization failure (40P01, 40001): nothing was written, the same again may pass.
    Conflict,
    /// PostgreSQL refused a value or a constraint was hurt (SQLSTATE 22, 23): the same data fails again.
    Refused,
    /// Rows are not as every transaction of ours leaves them. The same again fails again, and somebody has to look.
    Invariant,
    /// Anything else: a bug of ours.
    Bug,
}

impl Failure {
    /// The code that a caller gets.
    pub fn code(self) -> Code {
        match self {
            Failure::NotConnected
            | Failure::Lost
            | Failure::ReadOnly
            | Failure::Locked
            | Failure::TimedOut
            | Failure::Conflict => Code::Unavailable,
            Failure::Exhausted => Code::ResourceExhausted,
            Failure::Refused | Failure::Invariant | Failure::Bug => Code::Internal,
        }
    }

    /// What a caller may know of it: no SQL, no address.
    pub fn message(self) -> &'static str {
        match self {
            Failure::NotConnected | Failure::Lost => {
                "the service cannot reach its database, try again later"
            }
            Failure::Exhausted => {
                "too many calls use the service's database at once, try again later"
            }
            Failure::ReadOnly => "the service's database takes no writes now, try again later",
            Failure::Locked => {
                "rows that this call needs are locked by another transaction, try again later"
            }
            Failure::TimedOut => "the statement took too long, try again later",
            Failure::Conflict => "another transaction was in the way, try again",
            Failure::Refused | Failure::Invariant | Failure::Bug => "internal error",
        }
    }

    /// What an error of sqlx means.
    pub fn of(error: &sqlx::Error) -> Failure {
        classify(error)
    }

    /// Whether the server is at fault, or was not reached.
    pub fn is_outage(self) -> bool {
        matches!(
            self,
            Failure::NotConnected
                | Failure::Lost
                | Failure::ReadOnly
                | Failure::Locked
                | Failure::TimedOut
        )
    }

    /// Whether the same again can pass without anybody mending anything.
    pub fn passes(self) -> bool {
        self.code() != Code::Internal
    }
}

/// A failure with its cause, which is for the log and never for a caller.
#[derive(Debug)]
pub struct Error {
    failure: Failure,
    cause: String,
    /// Time ran out before the server said anything.
    silence: bool,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cause)
    }
}

impl std::error::Error for Error {}

impl Error {
    /// A row that should be there is not, or has what it never should have; `what` names it for the operator.
    pub fn invariant(what: impl Into<String>) -> Error {
        Error::new(Failure::Invariant, what)
    }

    /// Another transaction was in the way, and nothing was written.
    pub fn conflict(cause: impl Into<String>) -> Error {
        Error::new(Failure::Conflict, cause)
    }

    pub(super) fn new(failure: Failure, cause: impl Into<String>) -> Error {
        Error {
            failure,
            cause: cause.into(),
            silence: false,
        }
    }

    /// The server takes no writes.
    pub(crate) fn read_only() -> Error {
        Error::new(Failure::ReadOnly, "the server takes no writes")
    }

    /// The server said nothing in its time.
    pub(super) fn silent() -> Error {
        Error {
            silence: true,
            ..Error::new(Failure::Lost, "no answer in time")
        }
    }

    pub(super) fn is_silence(&self) -> bool {
        self.silence
    }

    /// A BEGIN that failed proves that nothing was written.
    pub(super) fn at_begin(error: sqlx::Error) -> Error {
        let mut error = Error::from(error);
        if error.failure == Failure::Lost {
            error.failure = Failure::NotConnected;
        }
        error
    }

    /// Writes it to the log: what passes by itself once for as long as it lasts, everything else as an error each time. Broken
    /// invariants are counted, for an alert.
    pub fn log(&self) {
        let (failure, error) = (self.failure, &self.cause);
        match failure {
            Failure::Invariant => {
                if let Some(counter) = BROKEN_INVARIANTS.get() {
                    counter.inc();
                }
                tracing::error!(error = %error, "invariant broken");
            }
            Failure::Refused | Failure::Bug => {
                tracing::error!(failure = ?failure, error = %error, "statement failed");
            }
            Failure::Locked => LOCKED.failed(error),
            Failure::Exhausted => EXHAUSTED.failed(error),
            _ => state_log::DATABASE.failed(error),
        }
    }

    pub fn failure(&self) -> Failure {
        self.failure
    }

    /// The code that a caller gets.
    pub fn code(&self) -> Code {
        self.failure.code()
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Error {
        Error {
            failure: classify(&error),
            cause: error.to_string(),
            silence: false,
        }
    }
}

fn classify(error: &sqlx::Error) -> Failure {
    match error {
        sqlx::Error::Database(database) => of_state(database.code().as_deref().unwrap_or_default()),
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::BeginFailed
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => Failure::Lost,
        // a value in a column that the domain has no name for, or a row that must be there
        sqlx::Error::Decode(_) | sqlx::Error::ColumnDecode { .. } | sqlx::Error::RowNotFound => {
            Failure::Invariant
        }
        _ => Failure::Bug,
    }
}

/// By SQLSTATE (PostgreSQL, appendix A).
fn of_state(code: &str) -> Failure {
    match code {
        "40001" | "40P01" => Failure::Conflict,
        "25006" => Failure::ReadOnly,
        "55P03" => Failure::Locked,
        "57014" => Failure::TimedOut,
        // a transaction or session that the server ended: 25P03, 25P04, 57P05 are its time-outs
        "25P03" | "25P04" => Failure::Lost,
        _ => match code.get(..2).unwrap_or_default() {
            "22" | "23" => Failure::Refused,
            // connection, authorization, no such database, resources, shutdown, I/O
            "08" | "28" | "3D" | "53" | "57" | "58" => Failure::Lost,
            _ => Failure::Bug,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_heals_by_itself_is_a_bug_and_no_bug_heals_by_itself() {
        for (code, failure) in [
            ("25006", Failure::ReadOnly),
            ("57P01", Failure::Lost),
            ("57P03", Failure::Lost),
            ("28P01", Failure::Lost),
            ("3D000", Failure::Lost),
            ("53300", Failure::Lost),
            ("57014", Failure::TimedOut),
            ("55P03", Failure::Locked),
            ("40P01", Failure::Conflict),
            ("23505", Failure::Refused),
            ("42703", Failure::Bug),
            ("25P02", Failure::Bug),
            ("", Failure::Bug),
        ] {
            assert_eq!(of_state(code), failure, "{code}");
        }
    }
}
