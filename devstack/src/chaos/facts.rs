//! What callers were told, as they were told it: the recount holds the tables and the log against this. What was asked and
//! never answered is here too, because it may have been done.

use std::collections::{BTreeMap, BTreeSet};

/// Units by SKU.
pub(super) type Lines = BTreeMap<i64, i64>;

/// A status of an order, as the contract spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    New,
    AwaitingPayment,
    Failed,
    Payed,
    Cancelled,
}

impl Status {
    const ALL: [Status; 5] = [
        Status::New,
        Status::AwaitingPayment,
        Status::Failed,
        Status::Payed,
        Status::Cancelled,
    ];

    /// `None` for a spelling that the contract does not have.
    pub fn parse(text: &str) -> Option<Status> {
        Status::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Status::New => "new",
            Status::AwaitingPayment => "awaiting payment",
            Status::Failed => "failed",
            Status::Payed => "payed",
            Status::Cancelled => "cancelled",
        }
    }

    /// Whether an order that was seen in this status may be in the other one later.
    pub fn may_become(self, later: Status) -> bool {
        use Status::{AwaitingPayment, Cancelled, New, Payed};
        self == later
            || self == New
            || (self == AwaitingPayment && matches!(later, Payed | Cancelled))
    }
}

/// What a caller was told about an order that will not be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refusal {
    Payment,
    Cancellation,
}

/// A CreateOrder straight to LOMS. Each has a user of its own, so that a second order for it is found without its key.
#[derive(Debug, Clone)]
pub struct OrderFact {
    pub key: Option<String>,
    pub lines: Lines,
    pub order: Option<i64>,
}

/// How a purchase ended, as its caller was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurchaseFact {
    /// There was no answer; it may have been begun.
    Asked,
    Made(i64),
    Failed(i64),
    Cancelled(i64),
    /// There was nothing to buy.
    Empty,
}

impl PurchaseFact {
    /// The order that the answer named.
    pub fn order(self) -> Option<i64> {
        match self {
            PurchaseFact::Made(order)
            | PurchaseFact::Failed(order)
            | PurchaseFact::Cancelled(order) => Some(order),
            PurchaseFact::Asked | PurchaseFact::Empty => None,
        }
    }
}

/// Units that AddToCart was asked for. It has no key, so a call without an answer may have added them or not.
#[derive(Debug, Clone, Copy, Default)]
pub struct Added {
    pub sure: i64,
    pub possible: i64,
}

/// Units by (warehouse, SKU), and whether the delivery was acknowledged.
#[derive(Debug, Clone)]
pub struct DeliveryFact {
    pub lines: BTreeMap<(i64, i64), i64>,
    pub received: bool,
}

/// Everything that callers know.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// By user.
    pub orders: BTreeMap<i64, OrderFact>,
    /// By (user, key).
    pub purchases: BTreeMap<(i64, String), PurchaseFact>,
    pub statuses: BTreeMap<i64, BTreeSet<Status>>,
    pub refusals: BTreeMap<i64, BTreeSet<Refusal>>,
    /// By (user, SKU).
    pub carts: BTreeMap<(i64, i64), Added>,
    pub deliveries: BTreeMap<String, DeliveryFact>,
    /// Two answers that cannot both be true.
    pub contradictions: Vec<String>,
}

impl Facts {
    /// Somebody is about to ask for an order.
    pub fn ask_order(&mut self, user: i64, key: Option<String>, lines: Lines) {
        let order = None;
        self.orders.insert(user, OrderFact { key, lines, order });
    }

    /// The order was answered, perhaps not for the first time.
    pub fn order_placed(&mut self, user: i64, order: i64, status: Status) {
        if let Some(fact) = self.orders.get_mut(&user) {
            let before = fact.order.replace(order);
            if before.is_some_and(|before| before != order) {
                self.contradictions.push(format!(
                    "user {user} was told order {before:?} and then {order} for one key"
                ));
            }
        }
        self.reached(order, status);
    }

    /// The order was seen in this status.
    pub fn reached(&mut self, order: i64, status: Status) {
        self.statuses.entry(order).or_default().insert(status);
    }

    /// A caller was told that this will not be done.
    pub fn refused(&mut self, order: i64, refusal: Refusal) {
        self.refusals.entry(order).or_default().insert(refusal);
    }

    /// Somebody is about to purchase.
    pub fn ask_purchase(&mut self, user: i64, key: &str) {
        let known = self.purchases.entry((user, key.to_owned()));
        known.or_insert(PurchaseFact::Asked);
    }

    /// The purchase was answered, perhaps not for the first time.
    pub fn purchase_ended(&mut self, user: i64, key: &str, fact: PurchaseFact) {
        let known = self.purchases.insert((user, key.to_owned()), fact);
        if let Some(known) = known
            && known != PurchaseFact::Asked
            && known != fact
        {
            self.contradictions.push(format!(
                "user {user} was told {known:?} and then {fact:?} for the key {key}"
            ));
        }
        match fact {
            PurchaseFact::Made(order) => self.reached(order, Status::AwaitingPayment),
            PurchaseFact::Failed(order) => self.reached(order, Status::Failed),
            PurchaseFact::Cancelled(order) => self.reached(order, Status::Cancelled),
            PurchaseFact::Asked | PurchaseFact::Empty => {}
        }
    }

    /// Units may now be in the cart.
    pub fn ask_units(&mut self, user: i64, sku: i64, units: i64) {
        self.carts.entry((user, sku)).or_default().possible += units;
    }

    /// They are in the cart, or they certainly are not.
    pub fn units_answered(&mut self, user: i64, sku: i64, units: i64, added: bool) {
        let known = self.carts.entry((user, sku)).or_default();
        if added {
            known.sure += units;
        } else {
            known.possible -= units;
        }
    }

    /// Orders that somebody was told of.
    pub fn acknowledged(&self) -> BTreeSet<i64> {
        let placed = self.orders.values().filter_map(|fact| fact.order);
        let bought = self.purchases.values().filter_map(|fact| fact.order());
        placed.chain(bought).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_lead_where_the_contract_says() {
        let leads = |from: Status| {
            let to = Status::ALL.into_iter().filter(|to| from.may_become(*to));
            to.map(Status::as_str).collect::<Vec<_>>()
        };
        assert_eq!(leads(Status::New).len(), 5);
        assert_eq!(
            leads(Status::AwaitingPayment),
            ["awaiting payment", "payed", "cancelled"]
        );
        for end in [Status::Failed, Status::Payed, Status::Cancelled] {
            assert_eq!(leads(end), [end.as_str()]);
        }
    }

    #[test]
    fn two_orders_for_a_key_are_a_contradiction() {
        let mut facts = Facts::default();
        facts.ask_order(7, Some("k".to_owned()), Lines::from([(1, 1)]));
        facts.order_placed(7, 1, Status::AwaitingPayment);
        facts.order_placed(7, 1, Status::Payed);
        facts.ask_purchase(8, "k");
        facts.purchase_ended(8, "k", PurchaseFact::Made(3));
        facts.ask_purchase(8, "k");
        facts.purchase_ended(8, "k", PurchaseFact::Made(3));
        assert!(facts.contradictions.is_empty());
        facts.order_placed(7, 2, Status::AwaitingPayment);
        facts.purchase_ended(8, "k", PurchaseFact::Made(4));
        assert_eq!(facts.contradictions.len(), 2);
    }
}
