//! What an order is: identifiers and lines that cannot be wrong, and the only place that knows which status may follow
//! which.

use std::{collections::BTreeMap, fmt};

use platform::error::Fields;

/// An order's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct OrderId(pub i64);

/// A user's number, above 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct UserId(i64);

/// A stock keeping unit, above 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Sku(u32);

/// Units of one SKU in one order, 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Quantity(u32);

/// A warehouse's number, above 0 and below the highest of a BIGINT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct WarehouseId(i64);

/// The most SKUs that one order may have.
pub(crate) const MAX_SKUS: usize = 1000;
/// The most units of one SKU that one order may have.
pub(crate) const MAX_QUANTITY: u32 = 65_535;

impl UserId {
    pub(crate) fn new(id: i64) -> Option<Self> {
        (id > 0).then_some(UserId(id))
    }
    pub(crate) fn get(self) -> i64 {
        self.0
    }
}

impl Sku {
    pub(crate) fn new(sku: u32) -> Option<Self> {
        (sku > 0).then_some(Sku(sku))
    }
    /// As the database has it.
    pub(crate) fn from_db(sku: i64) -> Option<Self> {
        u32::try_from(sku).ok().and_then(Sku::new)
    }
    pub(crate) fn get(self) -> u32 {
        self.0
    }
    pub(crate) fn db(self) -> i64 {
        i64::from(self.0)
    }
}

impl Quantity {
    pub(crate) fn new(units: u32) -> Option<Self> {
        (1..=MAX_QUANTITY)
            .contains(&units)
            .then_some(Quantity(units))
    }
    pub(crate) fn get(self) -> u32 {
        self.0
    }
}

impl WarehouseId {
    /// Of units that were sold before an import: where they lay nobody kept. It is never on sale,
    /// and no delivery can name it.
    pub(crate) const BEFORE_IMPORT: WarehouseId = WarehouseId(i64::MAX);

    pub(crate) fn new(id: i64) -> Option<Self> {
        (1..Self::BEFORE_IMPORT.0)
            .contains(&id)
            .then_some(WarehouseId(id))
    }
    pub(crate) const fn get(self) -> i64 {
        self.0
    }
}

/// The lines of an order, summed and in the order of SKU; never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lines(BTreeMap<Sku, Quantity>);

impl Lines {
    /// Sums repeated SKUs; notes in `fields` what is wrong, and is `None` then.
    pub(crate) fn parse(items: &[(u32, u32)], fields: &mut Fields) -> Option<Self> {
        let mut sums: BTreeMap<Sku, u64> = BTreeMap::new();
        let mut fine = !items.is_empty();
        fields.check(fine, "items", "must not be empty");
        for (index, &(sku, count)) in items.iter().enumerate() {
            let (sku, quantity) = (Sku::new(sku), Quantity::new(count));
            fields.check(
                sku.is_some(),
                format!("items[{index}].sku"),
                "must not be 0",
            );
            fields.check(
                quantity.is_some(),
                format!("items[{index}].count"),
                "must be 1 to 65535",
            );
            match (sku, quantity) {
                (Some(sku), Some(quantity)) => {
                    *sums.entry(sku).or_default() += u64::from(quantity.get())
                }
                _ => fine = false,
            }
        }
        if sums.len() > MAX_SKUS {
            fields.push(
                "items",
                format!("has {} SKUs, at most {MAX_SKUS} are allowed", sums.len()),
            );
            fine = false;
        }
        let mut lines = BTreeMap::new();
        for (sku, sum) in sums {
            match u32::try_from(sum).ok().and_then(Quantity::new) {
                Some(quantity) => drop(lines.insert(sku, quantity)),
                None => {
                    let text = format!(
                        "SKU {} sums to {sum} units, at most {MAX_QUANTITY} are allowed",
                        sku.get()
                    );
                    fields.push("items", text);
                    fine = false;
                }
            }
        }
        fine.then_some(Lines(lines))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Sku, Quantity)> + '_ {
        self.0.iter().map(|(&sku, &quantity)| (sku, quantity))
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

/// Where an order stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Status {
    New,
    AwaitingPayment,
    Failed,
    Payed,
    Cancelled,
}

/// What can happen to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Every unit is reserved.
    Reserve,
    /// Stock was short; nothing is reserved.
    Reject,
    Pay,
    Cancel,
    /// The payment deadline passed.
    Expire,
    /// The purchase that made it was given up.
    Abandon,
}

/// An event that the status does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Illegal;

impl Status {
    pub(crate) const ALL: [Status; 5] = [
        Status::New,
        Status::AwaitingPayment,
        Status::Failed,
        Status::Payed,
        Status::Cancelled,
    ];

    /// The status that the contract spells so.
    pub(crate) fn parse(text: &str) -> Option<Status> {
        Status::ALL
            .into_iter()
            .find(|status| status.as_str() == text)
    }

    /// The status after `event`. Paying or cancelling again is no change, so that callers may retry.
    pub(crate) fn apply(self, event: Event) -> Result<Status, Illegal> {
        match (self, event) {
            (Status::New, Event::Reserve) => Ok(Status::AwaitingPayment),
            (Status::New, Event::Reject) => Ok(Status::Failed),
            (Status::AwaitingPayment | Status::Payed, Event::Pay) => Ok(Status::Payed),
            (
                Status::AwaitingPayment | Status::Cancelled,
                Event::Cancel | Event::Expire | Event::Abandon,
            ) => Ok(Status::Cancelled),
            (Status::New, Event::Pay | Event::Cancel | Event::Expire | Event::Abandon)
            | (Status::AwaitingPayment, Event::Reserve | Event::Reject)
            | (Status::Failed, _)
            | (
                Status::Payed,
                Event::Reserve | Event::Reject | Event::Cancel | Event::Expire | Event::Abandon,
            )
            | (Status::Cancelled, Event::Reserve | Event::Reject | Event::Pay) => Err(Illegal),
        }
    }

    /// The contract's spelling.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Status::New => "new",
            Status::AwaitingPayment => "awaiting payment",
            Status::Failed => "failed",
            Status::Payed => "payed",
            Status::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who changed an order's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Actor {
    User,
    Timeout,
    /// The system before, or what was made of its orders when they were taken over.
    Import,
    /// Checkout, for a purchase that was given up.
    Abandoned,
}

impl Actor {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Actor::User => "user",
            Actor::Timeout => "timeout",
            Actor::Import => "import",
            Actor::Abandoned => "abandoned",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVENTS: [Event; 6] = [
        Event::Reserve,
        Event::Reject,
        Event::Pay,
        Event::Cancel,
        Event::Expire,
        Event::Abandon,
    ];

    #[test]
    fn the_whole_table_of_statuses_and_events() {
        let (no, pay, cancel) = (Err(Illegal), Ok(Status::Payed), Ok(Status::Cancelled));
        let table = [
            (
                Status::New,
                [
                    Ok(Status::AwaitingPayment),
                    Ok(Status::Failed),
                    no,
                    no,
                    no,
                    no,
                ],
            ),
            (
                Status::AwaitingPayment,
                [no, no, pay, cancel, cancel, cancel],
            ),
            (Status::Failed, [no; 6]),
            (Status::Payed, [no, no, pay, no, no, no]),
            (Status::Cancelled, [no, no, no, cancel, cancel, cancel]),
        ];
        for (status, row) in table {
            for (event, expected) in EVENTS.into_iter().zip(row) {
                assert_eq!(status.apply(event), expected, "{status:?} {event:?}");
            }
        }
    }

    #[test]
    fn repeated_lines_are_summed_and_sorted() {
        let mut fields = Fields::new();
        let lines = Lines::parse(&[(7, 2), (3, 1), (7, 5)], &mut fields).unwrap();
        fields.finish().unwrap();
        let lines: Vec<_> = lines
            .iter()
            .map(|(sku, quantity)| (sku.get(), quantity.get()))
            .collect();
        assert_eq!(lines, [(3, 1), (7, 7)]);
    }

    #[test]
    fn everything_wrong_is_named_at_once() {
        let mut fields = Fields::new();
        assert_eq!(
            Lines::parse(
                &[(0, 1), (1, 0), (2, 65_536), (3, 65_535), (3, 1)],
                &mut fields
            ),
            None
        );
        let wrong: Vec<_> = fields
            .finish()
            .unwrap_err()
            .into_iter()
            .map(|v| v.field)
            .collect();
        assert_eq!(
            wrong,
            ["items[0].sku", "items[1].count", "items[2].count", "items"]
        );
        let many: Vec<_> = (1..=1001).map(|sku| (sku, 1)).collect();
        assert_eq!(Lines::parse(&many, &mut Fields::new()), None);
        assert!(Lines::parse(&many[..1000], &mut Fields::new()).is_some());
        assert_eq!(Lines::parse(&[], &mut Fields::new()), None);
    }
}
