//! Everything that can go wrong here, and what a caller gets to hear of it. `code()` is the table of refusals; causes
//! (SQL, addresses, a neighbour's words) are logged once, on the way out, and never shown.

use platform::{
    error::{Code, Detail, Fault, LISTED, Violation},
    grpc::Deadline,
    pg,
    state_log::StateLog,
    tasks::TaskFailed,
};

use crate::{
    cart::{MAX_SKUS, Quantity, Sku},
    clients,
    purchase::{OrderId, Shortage},
};

/// For whatever reason: callers with little time are among them.
static LOCKED: StateLog = StateLog::new("stock locked", "stock is not locked any more");
static LATE: StateLog = StateLog::new("answers too late", "answers are in time again");

/// A refusal or a failure of the service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Fields of the request are not as they must be.
    #[error("invalid request")]
    Invalid(Vec<Violation>),
    /// There is nothing of the SKU to delete.
    #[error("the cart does not hold SKU {sku}")]
    NotInCart { sku: Sku },
    /// Products of the cart have no name and no price.
    #[error("ProductService does not know SKU {}", join(skus))]
    UnknownProducts { skus: Vec<Sku> },
    /// Nobody has so many units.
    #[error("SKU {sku}: {asked} units asked and {in_cart} in the cart, but {available} on sale")]
    InsufficientStock {
        sku: Sku,
        asked: u32,
        in_cart: u32,
        available: u64,
    },
    /// The cart's limits.
    #[error(
        "the cart is full: at most {MAX_SKUS} SKUs and {} units of one, an open purchase included",
        Quantity::MAX
    )]
    CartFull { sku: Sku },
    /// Nothing to purchase.
    #[error("the cart is empty")]
    EmptyCart,
    /// The order was placed and failed.
    #[error(
        "order {order} failed: not enough stock of {}",
        name_shortages(shortages)
    )]
    OrderFailed {
        order: OrderId,
        shortages: Vec<Shortage>,
    },
    /// The order was cancelled before its user was told of it.
    #[error("order {order} was cancelled; its lines are back in the cart")]
    OrderCancelled { order: OrderId },
    /// LOMS does not take such an order.
    #[error("the order was refused; its lines are back in the cart")]
    OrderRefused,
    /// LOMS ignores keys, and did not answer the one time that it was asked.
    #[error("nobody knows whether an order was made; its lines are back in the cart")]
    OrderOutcomeUnknown { order: Option<OrderId> },
    /// The same, before its lines are given back.
    #[error("whether an order was made is not known yet, try again later")]
    OrderOutcomePending,
    /// LOMS has the order, but not yet what became of it.
    #[error("order {order} is not decided yet, try again later")]
    OrderUndecided { order: OrderId },
    /// The total does not fit the contract's uint32.
    #[error("the cart's total price is over {}", u32::MAX)]
    TotalTooLarge,
    /// A neighbour cannot be reached, or broke off.
    #[error("{neighbour} is unavailable, try again later")]
    NeighbourAway {
        neighbour: &'static str,
        cause: String,
    },
    /// Another session of LOMS has locked the stock, longer than an order waits.
    #[error("the stock is locked by other work at the moment, try again later")]
    StockLocked,
    /// A neighbour has too much to do.
    #[error("{neighbour} has too much to do, try again later")]
    NeighbourBusy { neighbour: &'static str },
    /// There was no answer in the time that the caller, or this service, allows.
    #[error("{waited_for} did not answer in time")]
    Late { waited_for: &'static str },
    /// A neighbour answered what it never should.
    #[error("internal error")]
    NeighbourBroken {
        neighbour: &'static str,
        cause: String,
    },
    /// The database failed.
    #[error("{}", .0.failure().message())]
    Database(#[from] pg::Error),
    /// A task of ours panicked.
    #[error("internal error")]
    Task(#[from] TaskFailed),
    /// A purchase that was being looked at is gone; it was swept, which takes days.
    #[error("internal error")]
    PurchaseGone,
}

impl Error {
    /// To be asked before anything is written: whoever was told that it is late may send it again.
    ///
    /// # Errors
    /// The deadline has passed.
    pub fn unless_in_time(deadline: Deadline) -> Result<(), Error> {
        if deadline.passed() {
            return Err(Self::Late {
                waited_for: "the database",
            });
        }
        Ok(())
    }

    /// The gRPC code of each case.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid(_) => Code::InvalidArgument,
            Self::NotInCart { .. } | Self::UnknownProducts { .. } => Code::NotFound,
            Self::InsufficientStock { .. }
            | Self::CartFull { .. }
            | Self::EmptyCart
            | Self::OrderFailed { .. }
            | Self::OrderCancelled { .. }
            | Self::OrderOutcomeUnknown { .. }
            | Self::OrderRefused => Code::FailedPrecondition,
            Self::TotalTooLarge => Code::OutOfRange,
            Self::NeighbourAway { .. }
            | Self::OrderUndecided { .. }
            | Self::OrderOutcomePending
            | Self::StockLocked => Code::Unavailable,
            Self::NeighbourBusy { .. } => Code::ResourceExhausted,
            Self::Late { .. } => Code::DeadlineExceeded,
            Self::Database(error) => error.code(),
            Self::NeighbourBroken { .. } | Self::Task(_) | Self::PurchaseGone => Code::Internal,
        }
    }

    fn detail(&self) -> Detail {
        let reason = |reason, metadata| Detail::Reason { reason, metadata };
        match self {
            Self::Invalid(violations) => Detail::Fields {
                violations: violations.clone(),
                more: 0,
            },
            Self::NotInCart { sku } => reason("NOT_IN_CART", vec![pair("sku", sku)]),
            Self::UnknownProducts { skus } => {
                reason("PRODUCT_UNKNOWN", vec![pair("skus", join(skus))])
            }
            Self::InsufficientStock {
                sku,
                asked,
                in_cart,
                available,
            } => reason(
                "INSUFFICIENT_STOCK",
                vec![
                    pair("sku", sku),
                    pair("requested", asked),
                    pair("in_cart", in_cart),
                    pair("available", available),
                ],
            ),
            Self::CartFull { sku } => reason("CART_FULL", vec![pair("sku", sku)]),
            Self::EmptyCart => reason("EMPTY_CART", vec![]),
            Self::OrderFailed { order, shortages } => reason(
                "INSUFFICIENT_STOCK",
                vec![
                    pair("order_id", order),
                    pair("shortages", list_shortages(shortages)),
                    pair("shortages_total", shortages.len()),
                ],
            ),
            Self::OrderCancelled { order } => {
                reason("ORDER_CANCELLED", vec![pair("order_id", order)])
            }
            Self::OrderOutcomeUnknown { order } => {
                let order = order.map(|order| pair("order_id", order));
                reason("ORDER_OUTCOME_UNKNOWN", order.into_iter().collect())
            }
            Self::OrderRefused => reason("ORDER_REFUSED", vec![]),
            Self::StockLocked => reason("STOCK_LOCKED", vec![]),
            Self::TotalTooLarge => reason("TOTAL_TOO_LARGE", vec![pair("most", u32::MAX)]),
            Self::NeighbourAway { .. }
            | Self::OrderUndecided { .. }
            | Self::OrderOutcomePending
            | Self::NeighbourBusy { .. }
            | Self::Late { .. }
            | Self::NeighbourBroken { .. }
            | Self::Database(_)
            | Self::Task(_)
            | Self::PurchaseGone => Detail::None,
        }
    }

    /// Once for each error: on its way out, or where a worker goes on without it.
    pub fn log(&self) {
        match self {
            Self::NeighbourAway { neighbour, cause } => clients::state(neighbour).failed(cause),
            Self::StockLocked => LOCKED.failed(self),
            Self::OrderUndecided { order } => {
                tracing::warn!(order.id = order.0, "order not decided")
            }
            Self::NeighbourBusy { neighbour } => {
                clients::state(neighbour).failed(&"it has too much to do");
            }
            Self::Late { waited_for } => LATE.failed(waited_for),
            Self::NeighbourBroken { neighbour, cause } => {
                tracing::error!(neighbour, error = %cause, "neighbour answered nonsense");
            }
            Self::Database(error) => error.log(),
            Self::PurchaseGone => tracing::error!("purchase vanished while it was decided"),
            // logged where it panicked
            Self::Task(_) => {}
            // the caller's business
            Self::Invalid(_)
            | Self::NotInCart { .. }
            | Self::UnknownProducts { .. }
            | Self::InsufficientStock { .. }
            | Self::CartFull { .. }
            | Self::EmptyCart
            | Self::OrderFailed { .. }
            | Self::OrderCancelled { .. }
            | Self::OrderRefused
            | Self::TotalTooLarge => {}
            // said when its purchase was closed, and while it is open it is said that keys are
            // ignored
            Self::OrderOutcomeUnknown { .. } | Self::OrderOutcomePending => {}
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        error.log();
        match error {
            Error::Invalid(violations) => Fault::invalid(violations),
            error => Fault {
                code: error.code(),
                message: error.to_string(),
                detail: error.detail(),
            },
        }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        Fault::from(error).into()
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error.into())
    }
}

fn pair(name: &str, value: impl ToString) -> (String, String) {
    (name.to_owned(), value.to_string())
}

fn join(skus: &[Sku]) -> String {
    let listed: Vec<_> = skus.iter().take(LISTED).map(Sku::to_string).collect();
    let over = skus.len().saturating_sub(LISTED);
    match over {
        0 => listed.join(", "),
        _ => format!("{} and {over} more", listed.join(", ")),
    }
}

/// A few of them, for people; programs read the details.
fn name_shortages(shortages: &[Shortage]) -> String {
    let named: Vec<_> = shortages
        .iter()
        .take(3)
        .map(|short| {
            format!(
                "SKU {} ({} asked, {} left)",
                short.sku, short.requested, short.available
            )
        })
        .collect();
    match shortages.len().saturating_sub(named.len()) {
        0 => named.join(", "),
        over => format!("{} and {over} more", named.join(", ")),
    }
}

/// JSON, because metadata has room for text only. Bounded like violations: details travel in HTTP/2 headers.
fn list_shortages(shortages: &[Shortage]) -> String {
    let listed = &shortages[..shortages.len().min(LISTED)];
    serde_json::to_string(listed).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_shortages_stay_small() {
        let short = |sku| Shortage {
            sku,
            requested: 65_535,
            available: 65_534,
        };
        let shortages: Vec<_> = (1..=700).map(|n| short(u32::MAX - n)).collect();
        let status = tonic::Status::from(Error::OrderFailed {
            order: OrderId(i64::MAX),
            shortages,
        });
        assert!(
            status.details().len() < 6 * 1024,
            "{}",
            status.details().len()
        );
        assert!(
            status.message().ends_with("and 697 more"),
            "{}",
            status.message()
        );
    }

    #[test]
    fn causes_are_not_shown() {
        let cause = "password=secret".to_owned();
        for error in [
            Error::NeighbourAway {
                neighbour: "loms",
                cause: cause.clone(),
            },
            Error::NeighbourBroken {
                neighbour: "loms",
                cause: cause.clone(),
            },
            Error::from(sqlx::Error::Protocol(cause.clone())),
            Error::from(sqlx::Error::Decode(cause.clone().into())),
        ] {
            let status = tonic::Status::from(error);
            assert!(!status.message().contains("secret"), "{}", status.message());
            assert!(status.details().is_empty());
        }
    }
}
