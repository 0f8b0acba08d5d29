//! What becomes of an order of the system before. Pure.

use std::{collections::BTreeMap, iter};

use time::OffsetDateTime;

use crate::order::{Sku, Status, UserId, WarehouseId};

/// As columns have it.
pub(crate) const UNKNOWN_WAREHOUSE: i64 = WarehouseId::BEFORE_IMPORT.get();

/// Units by SKU and warehouse.
pub(crate) type Units = BTreeMap<(i64, i64), i64>;

/// An order as the system before has it.
#[derive(Clone, Debug)]
pub(crate) struct OldOrder {
    pub(crate) id: i64,
    pub(crate) user: i64,
    pub(crate) status: String,
    pub(crate) created_at: Option<OffsetDateTime>,
    pub(crate) updated_at: Option<OffsetDateTime>,
    /// Units by SKU.
    pub(crate) items: BTreeMap<i64, i64>,
    pub(crate) reserved: Units,
}

/// The same order as it is taken over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct ImportedOrder {
    pub(crate) id: i64,
    pub(crate) user: i64,
    pub(crate) status: Status,
    pub(crate) created_at: Option<OffsetDateTime>,
    pub(crate) history: Vec<Step>,
    pub(crate) items: BTreeMap<i64, i64>,
    /// Lines that no order can have: without units, or of SKU 0.
    pub(crate) left_out: usize,
    pub(crate) reserved: Units,
    pub(crate) sold: Units,
    /// Units that were reserved for it and are not: they go back on sale.
    pub(crate) released: i64,
    /// Whether the import made its last step, which is to be told.
    pub(crate) decided: bool,
}

/// A step of a history.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) from: Option<Status>,
    pub(crate) to: Status,
    pub(crate) at: Option<OffsetDateTime>,
}

impl OldOrder {
    /// An order that is `new`, or awaits payment with less than all of it reserved, is `failed` by
    /// this; every other keeps its status. What awaits payment keeps its reservation, what is payed
    /// is sold, and all else goes back.
    ///
    /// # Errors
    /// Why it cannot be taken over.
    pub(crate) fn decide(&self) -> Result<ImportedOrder, String> {
        let old = Status::parse(&self.status)
            .ok_or_else(|| format!("order {} has the status {:?}", self.id, self.status))?;
        UserId::new(self.user)
            .ok_or_else(|| format!("order {} is of user {}", self.id, self.user))?;
        let items = self.items.iter().filter(|&(&sku, &units)| {
            Sku::from_db(sku).is_some() && (1..=i64::from(u32::MAX)).contains(&units)
        });
        let items: BTreeMap<i64, i64> = items.map(|(&sku, &units)| (sku, units)).collect();
        let held = hold(&items, &self.reserved);
        let is_whole = !items.is_empty()
            && items
                .iter()
                .all(|(&sku, &units)| of_sku(&held, sku) == units);
        let decided = match old {
            Status::New => true,
            Status::AwaitingPayment => !is_whole,
            Status::Failed | Status::Payed | Status::Cancelled => false,
        };
        let status = if decided { Status::Failed } else { old };
        let (reserved, sold) = match status {
            Status::AwaitingPayment => (held, Units::new()),
            Status::Payed => (Units::new(), sell(&items, held)),
            Status::New | Status::Failed | Status::Cancelled => (Units::new(), Units::new()),
        };
        let kept = known(&reserved).chain(known(&sold));
        let kept: i64 = kept.map(|(_, units)| units).sum();
        Ok(ImportedOrder {
            id: self.id,
            user: self.user,
            status,
            created_at: self.created_at,
            history: self.history(status, decided),
            left_out: self.items.len() - items.len(),
            items,
            released: positive(&self.reserved)
                .map(|(_, units)| units)
                .sum::<i64>()
                - kept,
            reserved,
            sold,
            decided,
        })
    }

    /// The steps to `status`. The system before wrote down at most when the order began and when it
    /// last changed.
    fn history(&self, status: Status, decided: bool) -> Vec<Step> {
        let reached: &[Status] = match status {
            Status::New => &[Status::New],
            Status::AwaitingPayment => &[Status::New, Status::AwaitingPayment],
            Status::Failed => &[Status::New, Status::Failed],
            Status::Payed => &[Status::New, Status::AwaitingPayment, Status::Payed],
            Status::Cancelled => &[Status::New, Status::AwaitingPayment, Status::Cancelled],
        };
        let from = iter::once(None).chain(reached.iter().copied().map(Some));
        let steps = from.zip(reached).map(|(from, &to)| {
            let at = match to {
                _ if decided && to == status => None,
                Status::Payed | Status::Cancelled => self.updated_at.or(self.created_at),
                Status::New | Status::AwaitingPayment | Status::Failed => self.created_at,
            };
            Step { from, to, at }
        });
        steps.collect()
    }
}

/// Of `reserved` what `items` asks for, warehouses with low numbers first: the system before may
/// have reserved more.
fn hold(items: &BTreeMap<i64, i64>, reserved: &Units) -> Units {
    let mut wanted = items.clone();
    let mut held = Units::new();
    for (&(sku, warehouse), units) in positive(reserved) {
        let Some(open) = wanted.get_mut(&sku) else {
            continue;
        };
        let taken = units.min(*open);
        *open -= taken;
        if taken > 0 {
            held.insert((sku, warehouse), taken);
        }
    }
    held
}

/// All of `items` from where they are `held`; those that are not, from [`UNKNOWN_WAREHOUSE`].
fn sell(items: &BTreeMap<i64, i64>, held: Units) -> Units {
    let mut sold = held;
    for (&sku, &units) in items {
        let open = units - of_sku(&sold, sku);
        if open > 0 {
            sold.insert((sku, UNKNOWN_WAREHOUSE), open);
        }
    }
    sold
}

fn of_sku(units: &Units, sku: i64) -> i64 {
    let of_sku = units.range((sku, i64::MIN)..=(sku, i64::MAX));
    of_sku.map(|(_, units)| units).sum()
}

fn positive(units: &Units) -> impl Iterator<Item = (&(i64, i64), i64)> {
    let all = units.iter().map(|(key, &units)| (key, units));
    all.filter(|&(_, units)| units > 0)
}

/// Units whose warehouse is known.
pub(crate) fn known(units: &Units) -> impl Iterator<Item = ((i64, i64), i64)> + '_ {
    let all = units.iter().map(|(&key, &units)| (key, units));
    all.filter(|((_, warehouse), _)| *warehouse != UNKNOWN_WAREHOUSE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn order(status: &str, items: &[(i64, i64)], reserved: &[(i64, i64, i64)]) -> OldOrder {
        OldOrder {
            id: 1,
            user: 7,
            status: status.into(),
            created_at: None,
            updated_at: None,
            items: items.iter().copied().collect(),
            reserved: reserved
                .iter()
                .map(|&(sku, warehouse, units)| ((sku, warehouse), units))
                .collect(),
        }
    }

    #[test]
    fn what_is_not_wholly_reserved_fails_and_is_told() {
        let items = [(7, 2), (8, 1)];
        let whole = [(7, 1, 1), (7, 2, 1), (8, 1, 1)];
        for (status, reserved, becomes, decided, released) in [
            ("new", &whole[..], Status::Failed, true, 3),
            ("new", &[], Status::Failed, true, 0),
            (
                "awaiting payment",
                &whole,
                Status::AwaitingPayment,
                false,
                0,
            ),
            ("awaiting payment", &whole[1..], Status::Failed, true, 2),
            ("awaiting payment", &[], Status::Failed, true, 0),
            ("failed", &whole[..1], Status::Failed, false, 1),
            ("cancelled", &whole, Status::Cancelled, false, 3),
        ] {
            let imported = order(status, &items, reserved).decide().unwrap();
            assert_eq!(
                (imported.status, imported.decided, imported.released),
                (becomes, decided, released),
                "{status} {reserved:?}"
            );
            assert!(imported.sold.is_empty());
            assert_eq!(
                imported.reserved.is_empty(),
                becomes != Status::AwaitingPayment
            );
        }
    }

    #[test]
    fn sold_units_are_of_the_warehouse_that_held_them_or_of_an_unknown_one() {
        let reserved = [(7, 1, 1), (9, 1, 4)];
        let imported = order("payed", &[(7, 3), (8, 1)], &reserved)
            .decide()
            .unwrap();
        let sold = [
            ((7, 1), 1),
            ((7, UNKNOWN_WAREHOUSE), 2),
            ((8, UNKNOWN_WAREHOUSE), 1),
        ];
        assert_eq!(imported.sold, Units::from(sold));
        assert_eq!((imported.released, imported.decided), (4, false));
    }

    #[test]
    fn more_than_was_ordered_goes_back() {
        let reserved = [(7, 1, 2), (7, 2, 2), (8, 1, -3)];
        let imported = order("awaiting payment", &[(7, 3)], &reserved)
            .decide()
            .unwrap();
        assert_eq!(imported.status, Status::AwaitingPayment);
        assert_eq!(imported.reserved, Units::from([((7, 1), 2), ((7, 2), 1)]));
        assert_eq!(imported.released, 1);
    }

    #[test]
    fn lines_that_no_order_can_have_are_left_out() {
        let items = [(0, 1), (7, 0), (8, -1), (9, 70_000)];
        let imported = order("failed", &items, &[]).decide().unwrap();
        assert_eq!(imported.items, BTreeMap::from([(9, 70_000)]));
        assert_eq!(imported.left_out, 3);
        let empty = order("awaiting payment", &[], &[]).decide().unwrap();
        assert_eq!((empty.status, empty.decided), (Status::Failed, true));
        assert!(order("sent", &[], &[]).decide().is_err());
        let nobodys = OldOrder {
            user: 0,
            ..order("payed", &[], &[])
        };
        assert!(nobodys.decide().unwrap_err().contains("user 0"));
    }

    #[test]
    fn steps_have_the_times_of_the_order_or_none() {
        let (began, changed) = (
            OffsetDateTime::UNIX_EPOCH,
            OffsetDateTime::UNIX_EPOCH + time::Duration::HOUR,
        );
        let times = |status: &str, updated_at| {
            let order = OldOrder {
                created_at: Some(began),
                updated_at,
                ..order(status, &[(7, 1)], &[])
            };
            let history = order.decide().unwrap().history;
            history.iter().map(|step| step.at).collect::<Vec<_>>()
        };
        assert_eq!(
            times("payed", Some(changed)),
            [Some(began), Some(began), Some(changed)]
        );
        assert_eq!(times("cancelled", None), [Some(began); 3]);
        assert_eq!(times("failed", Some(changed)), [Some(began); 2]);
        // the import made the step
        assert_eq!(times("new", Some(changed)), [Some(began), None]);
    }

    proptest! {
        #[test]
        fn no_unit_is_lost_or_made(
            status in 0..5_usize,
            items in prop::collection::btree_map(0..4_i64, -1..5_i64, 0..4),
            reserved in prop::collection::btree_map((0..4_i64, 1..4_i64), -1..5_i64, 0..8),
        ) {
            let order = OldOrder {
                items,
                reserved: reserved.clone(),
                ..order(Status::ALL[status].as_str(), &[], &[])
            };
            let imported = order.decide().unwrap();
            let kept: i64 = known(&imported.reserved).chain(known(&imported.sold)).map(|(_, units)| units).sum();
            let had: i64 = reserved.values().filter(|units| **units > 0).sum();
            prop_assert_eq!(kept + imported.released, had);
            for (&sku, &units) in &imported.items {
                let wanted = |of: Status| if imported.status == of { units } else { 0 };
                prop_assert_eq!(of_sku(&imported.reserved, sku), wanted(Status::AwaitingPayment));
                prop_assert_eq!(of_sku(&imported.sold, sku), wanted(Status::Payed));
            }
            prop_assert_eq!(imported.history.last().map(|step| step.to), Some(imported.status));
        }
    }
}
