//! What a purchase is and how it can end. Pure: the order's status decides, `purchases.rs` asks for it and writes it down.

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::cart::{Line, UserId};

/// An order of LOMS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OrderId(pub i64);

impl fmt::Display for OrderId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The client's name for one purchase: 1 to 128 printable ASCII characters, unique per user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey(String);

impl IdempotencyKey {
    /// `None` for anything but 1 to 128 printable ASCII characters.
    pub fn new(key: String) -> Option<Self> {
        let fits = (1..=128).contains(&key.len());
        (fits && key.bytes().all(|byte| (b' '..=b'~').contains(&byte))).then_some(Self(key))
    }

    /// The key as the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What LOMS lacked of one SKU; kept with the purchase, so that a replay can name it again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shortage {
    /// The SKU.
    pub sku: u32,
    /// Units ordered.
    pub requested: u64,
    /// Units on sale when the order was placed.
    pub available: u64,
}

/// A status of an order, as the contract spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OrderStatus {
    /// `new`
    New,
    /// `awaiting payment`
    AwaitingPayment,
    /// `failed`
    Failed,
    /// `payed`
    Payed,
    /// `cancelled`
    Cancelled,
}

impl OrderStatus {
    /// `None` for a spelling the contract does not have.
    pub fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "new" => Self::New,
            "awaiting payment" => Self::AwaitingPayment,
            "failed" => Self::Failed,
            "payed" => Self::Payed,
            "cancelled" => Self::Cancelled,
            _ => return None,
        })
    }
}

/// The order that LOMS has for a purchase, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its number.
    pub id: OrderId,
    /// Its present status.
    pub status: OrderStatus,
    /// What was missing, when it failed.
    pub shortages: Vec<Shortage>,
}

/// How a purchase ended. Only `Made` keeps the lines; the others give them back to the cart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The order holds its units, or has them sold.
    Made {
        /// The order.
        order: OrderId,
    },
    /// There was not enough stock.
    Failed {
        /// The failed order.
        order: OrderId,
        /// What was missing.
        shortages: Vec<Shortage>,
    },
    /// The order was cancelled before its user was told of it.
    Cancelled {
        /// The cancelled order.
        order: OrderId,
    },
    /// LOMS does not take such an order.
    Refused {
        /// Why, in its words.
        reason: String,
    },
    /// LOMS ignores keys, was asked once and gave no answer: an order may exist.
    Unknown {
        /// The order, if it is known, which LOMS has not decided.
        order: Option<OrderId>,
    },
}

impl Outcome {
    /// Every name that [`Outcome::name`] may give.
    pub const NAMES: [&'static str; 5] = ["made", "failed", "cancelled", "refused", "unknown"];

    /// The name under which it is counted.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Made { .. } => "made",
            Self::Failed { .. } => "failed",
            Self::Cancelled { .. } => "cancelled",
            Self::Refused { .. } => "refused",
            Self::Unknown { .. } => "unknown",
        }
    }

    /// The order, where there is one.
    pub fn order(&self) -> Option<OrderId> {
        match self {
            Self::Made { order } | Self::Failed { order, .. } | Self::Cancelled { order } => {
                Some(*order)
            }
            Self::Unknown { order } => *order,
            Self::Refused { .. } => None,
        }
    }
}

/// A purchase whose outcome is not known yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPurchase {
    /// Its id, the key for LOMS.
    pub id: Uuid,
    /// The cart it came from.
    pub cart_id: i64,
    /// Who buys.
    pub user: UserId,
    /// What, in the order of SKU.
    pub lines: Vec<Line>,
    /// Too old to be completed: the order is cancelled if it still can be.
    pub resolving: bool,
    /// How often it was tried in vain.
    pub attempts: u32,
    /// The order that LOMS said it has made.
    pub order: Option<OrderId>,
    /// It was sent to a LOMS that ignores keys: never again.
    pub sent_keyless: bool,
    /// It was sent longer ago than `resolve_after`: no answer is to be expected any more.
    pub sent_long_ago: bool,
    /// The same of the cancellation of its order.
    pub cancel_sent_long_ago: bool,
}

impl OpenPurchase {
    /// Whether nothing more is to be waited for.
    pub fn is_given_up(&self) -> bool {
        self.resolving && self.sent_long_ago
    }
}

/// The user's last purchase, as a call finds it before it knows what to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Its id.
    pub id: Uuid,
    /// Whether it has a client's key.
    pub has_key: bool,
    /// Whether its outcome is known.
    pub closed: bool,
    /// Whether a caller has heard the outcome.
    pub told: bool,
}

/// What a call to Purchase does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Begin a purchase of what the cart holds.
    Begin,
    /// Answer with this one's outcome, finishing it if it is open.
    Answer(Uuid),
    /// Finish this one, which belongs to another key, then look again.
    FinishFirst(Uuid),
    /// There is nothing to buy.
    Empty,
}

/// Decides what a call does whose key, if it has one, is not known yet.
///
/// A call is answered from a purchase that it did not begin only if that stays exact when the call is repeated: a call
/// without a key always (a double click; a client that timed out and asks again), a call with a key only if the purchase
/// has none, for then it takes the call's.
pub fn start(last: Option<Found>, call_has_key: bool, cart_is_empty: bool) -> Start {
    let may_answer = |found: Found| !(call_has_key && found.has_key);
    match last {
        Some(open) if !open.closed && may_answer(open) => Start::Answer(open.id),
        Some(open) if !open.closed => Start::FinishFirst(open.id),
        _ if !cart_is_empty => Start::Begin,
        Some(untold) if !untold.told && may_answer(untold) => Start::Answer(untold.id),
        _ => Start::Empty,
    }
}

/// What to do about an open purchase, now that the status of its order is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It has ended.
    Close(Outcome),
    /// It is too old for its user to expect an order: cancel it, then look again.
    Cancel,
    /// The order is not decided yet; ask again later.
    Wait,
}

/// Decides an open purchase by its order; `given_up`: nothing more is to be waited for.
pub fn judge(order: Order, resolving: bool, given_up: bool) -> Verdict {
    let id = order.id;
    match order.status {
        OrderStatus::AwaitingPayment if resolving => Verdict::Cancel,
        OrderStatus::AwaitingPayment | OrderStatus::Payed => {
            Verdict::Close(Outcome::Made { order: id })
        }
        OrderStatus::Failed => Verdict::Close(Outcome::Failed {
            order: id,
            shortages: order.shortages,
        }),
        OrderStatus::Cancelled => Verdict::Close(Outcome::Cancelled { order: id }),
        OrderStatus::New if given_up => Verdict::Close(Outcome::Unknown { order: Some(id) }),
        OrderStatus::New => Verdict::Wait,
    }
}

/// How long to wait before attempt `attempts + 1`: doubling from `first` up to `most`, then anything between half and
/// all of that, so that purchases left open by one outage do not come back together. `random` is in 0..1.
pub fn backoff(attempts: u32, first: Duration, most: Duration, random: f64) -> Duration {
    let doubled = first
        .saturating_mul(2u32.saturating_pow(attempts.min(20)))
        .min(most);
    doubled.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(status: OrderStatus, resolving: bool, given_up: bool) -> Verdict {
        let shortages = vec![Shortage {
            sku: 1,
            requested: 2,
            available: 1,
        }];
        judge(
            Order {
                id: OrderId(7),
                status,
                shortages,
            },
            resolving,
            given_up,
        )
    }

    #[test]
    fn every_status_is_judged() {
        let order = OrderId(7);
        let shortages = vec![Shortage {
            sku: 1,
            requested: 2,
            available: 1,
        }];
        let made = Verdict::Close(Outcome::Made { order });
        let failed = Verdict::Close(Outcome::Failed { order, shortages });
        let cancelled = Verdict::Close(Outcome::Cancelled { order });
        let unknown = Verdict::Close(Outcome::Unknown { order: Some(order) });
        let table = [
            (OrderStatus::New, Verdict::Wait, unknown),
            (OrderStatus::AwaitingPayment, made.clone(), Verdict::Cancel),
            (OrderStatus::Payed, made.clone(), made),
            (OrderStatus::Failed, failed.clone(), failed),
            (OrderStatus::Cancelled, cancelled.clone(), cancelled),
        ];
        for (status, resumed, resolved) in table {
            assert_eq!(judged(status, false, false), resumed, "{status:?} resumed");
            assert_eq!(judged(status, true, true), resolved, "{status:?} resolved");
        }
        // sent a moment ago, for a purchase that is old
        assert_eq!(judged(OrderStatus::New, true, false), Verdict::Wait);
    }

    #[test]
    fn every_start_is_decided() {
        let id = Uuid::from_u128(7);
        let found = |has_key, closed, told| {
            Some(Found {
                id,
                has_key,
                closed,
                told,
            })
        };
        let (open, open_keyed) = (found(false, false, false), found(true, false, false));
        let (untold, untold_keyed) = (found(false, true, false), found(true, true, false));
        let told = found(false, true, true);
        // last purchase, the call has a key, the cart is empty
        let table = [
            (None, false, true, Start::Empty),
            (None, false, false, Start::Begin),
            (open, false, false, Start::Answer(id)),
            (open, true, true, Start::Answer(id)),
            (open_keyed, false, false, Start::Answer(id)),
            (open_keyed, true, false, Start::FinishFirst(id)),
            (open_keyed, true, true, Start::FinishFirst(id)),
            (untold, false, true, Start::Answer(id)),
            (untold, false, false, Start::Begin),
            (untold, true, true, Start::Answer(id)),
            (untold_keyed, false, true, Start::Answer(id)),
            (untold_keyed, true, true, Start::Empty),
            (told, false, true, Start::Empty),
            (told, true, false, Start::Begin),
        ];
        for (last, key, empty, expected) in table {
            assert_eq!(start(last, key, empty), expected, "{last:?} {key} {empty}");
        }
    }

    #[test]
    fn statuses_are_spelled_as_the_contract_spells_them() {
        for text in ["new", "awaiting payment", "failed", "payed", "cancelled"] {
            assert!(OrderStatus::parse(text).is_some(), "{text}");
        }
        assert_eq!(OrderStatus::parse("paid"), None);
    }

    #[test]
    fn keys_are_printable_ascii_of_bounded_length() {
        for good in ["a", "order 1~!", &"k".repeat(128)] {
            assert!(IdempotencyKey::new(good.to_owned()).is_some(), "{good}");
        }
        for bad in ["", "tab\t", "ключ", "\u{7f}", &"k".repeat(129)] {
            assert!(IdempotencyKey::new(bad.to_owned()).is_none(), "{bad}");
        }
    }

    #[test]
    fn backoff_doubles_up_to_its_bound_and_spreads() {
        let (first, most) = (Duration::from_millis(500), Duration::from_secs(30));
        assert_eq!(backoff(0, first, most, 1.0), first);
        assert_eq!(backoff(0, first, most, 0.0), first / 2);
        assert_eq!(backoff(3, first, most, 1.0), Duration::from_secs(4));
        assert_eq!(backoff(6, first, most, 1.0), most);
        assert_eq!(backoff(u32::MAX, first, most, 1.0), most);
    }
}
