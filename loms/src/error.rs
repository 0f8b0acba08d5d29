//! What can go wrong in LOMS, and how a caller hears of it.

use platform::{
    error::{Code, Detail, Fault, Violation},
    pg::{self, Failure},
};
use tonic::Status as GrpcStatus;

use crate::order::{Event, OrderId, Status};

/// Every way in which a use case can fail.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the request is not valid")]
    Invalid(Vec<Violation>),
    #[error("order {} is unknown", .0.0)]
    OrderUnknown(OrderId),
    #[error("order {} is {status} and cannot be {}", .order.0, verb(*.event))]
    Illegal {
        order: OrderId,
        status: Status,
        event: Event,
    },
    #[error("the payment deadline of order {} has passed", .0.0)]
    PaymentLate(OrderId),
    #[error("the idempotency key was used for another request")]
    KeyReused,
    #[error("the idempotency key was given up, no order is made for it")]
    KeyAbandoned,
    #[error("the idempotency key is too old to know what was made for it")]
    KeyExpired,
    #[error("the delivery id was used for another delivery")]
    DeliveryReused,
    #[error("only a caller with a client certificate may do this")]
    Stranger,
    #[error("too many orders wait for their turn, try again later")]
    Busy,
    #[error("the deadline passed while the order waited for its turn")]
    Late,
    #[error("the service is stopping, try again later")]
    Stopping,
    #[error("stock that the order needs is locked by another transaction, try again later")]
    StockLocked,
    /// The database failed for a whole batch; the cause was logged by whoever met it.
    #[error("{}", .0.message())]
    BatchFailed(Failure),
    #[error("internal error")]
    Broken,
    #[error("{}", .0.failure().message())]
    Database(#[from] pg::Error),
}

fn verb(event: Event) -> &'static str {
    match event {
        Event::Reserve => "reserved",
        Event::Reject => "rejected",
        Event::Pay => "payed",
        Event::Cancel => "cancelled",
        Event::Expire => "expired",
        Event::Abandon => "abandoned",
    }
}

impl Error {
    pub(crate) fn code(&self) -> Code {
        match self {
            Error::Invalid(_) | Error::KeyReused | Error::DeliveryReused => Code::InvalidArgument,
            Error::Stranger => Code::Unauthenticated,
            Error::OrderUnknown(_) => Code::NotFound,
            Error::Illegal { .. }
            | Error::PaymentLate(_)
            | Error::KeyAbandoned
            | Error::KeyExpired => Code::FailedPrecondition,
            Error::Busy => Code::ResourceExhausted,
            Error::Late => Code::DeadlineExceeded,
            Error::Stopping | Error::StockLocked => Code::Unavailable,
            Error::BatchFailed(failure) => failure.code(),
            Error::Broken => Code::Internal,
            Error::Database(error) => error.code(),
        }
    }

    fn detail(&self) -> Detail {
        match self {
            Error::Illegal {
                order,
                status,
                event,
            } => Detail::Precondition {
                kind: "ORDER_STATUS",
                subject: format!("orders/{}", order.0),
                description: format!("status is {status}, it cannot be {}", verb(*event)),
            },
            Error::PaymentLate(order) => Detail::Precondition {
                kind: "PAYMENT_DEADLINE",
                subject: format!("orders/{}", order.0),
                description: format!(
                    "status is {}, its payment deadline has passed",
                    Status::AwaitingPayment
                ),
            },
            Error::KeyReused => Detail::Reason {
                reason: "IDEMPOTENCY_KEY_REUSED",
                metadata: Vec::new(),
            },
            Error::KeyAbandoned => Detail::Reason {
                reason: "KEY_ABANDONED",
                metadata: Vec::new(),
            },
            Error::KeyExpired => Detail::Reason {
                reason: "KEY_EXPIRED",
                metadata: Vec::new(),
            },
            Error::DeliveryReused => Detail::Reason {
                reason: "DELIVERY_ID_REUSED",
                metadata: Vec::new(),
            },
            Error::Busy => Detail::Reason {
                reason: "PLACEMENT_QUEUE_FULL",
                metadata: Vec::new(),
            },
            Error::StockLocked => Detail::Reason {
                reason: "STOCK_LOCKED",
                metadata: Vec::new(),
            },
            Error::Invalid(_)
            | Error::Stranger
            | Error::OrderUnknown(_)
            | Error::Late
            | Error::Stopping
            | Error::BatchFailed(_)
            | Error::Broken
            | Error::Database(_) => Detail::None,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        let (code, detail) = (error.code(), error.detail());
        match error {
            Error::Invalid(violations) => Fault::invalid(violations),
            // the caller learns whether it may try again, the log learns why
            Error::Database(cause) => {
                cause.log();
                Fault::new(code, cause.failure().message())
            }
            other => Fault {
                code,
                message: other.to_string(),
                detail,
            },
        }
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Error {
        Error::Database(error.into())
    }
}

impl From<Error> for GrpcStatus {
    fn from(error: Error) -> GrpcStatus {
        Fault::from(error).into()
    }
}

/// For a command line: the cause belongs on the screen of whoever typed the command.
pub(crate) fn explain(error: Error) -> anyhow::Error {
    match error {
        Error::Database(cause) => anyhow::Error::from(cause).context("the database failed"),
        other => anyhow::anyhow!("{other}"),
    }
}
