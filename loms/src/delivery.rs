//! A delivery of stock, as it must be before it is booked. Pure.

use std::collections::BTreeMap;

use platform::error::{Fields, Violation};
use sha2::{Digest as _, Sha256};

use crate::order::{Sku, WarehouseId};

/// Units of one SKU that one delivery may bring to one warehouse; sums of these fit BIGINT.
const MAX_UNITS: u64 = 1_000_000_000;

/// A delivery whose lines are summed by SKU and warehouse.
#[derive(Debug)]
pub(crate) struct Delivery {
    id: String,
    lines: BTreeMap<(Sku, WarehouseId), u64>,
}

impl Delivery {
    /// # Errors
    /// Everything that is wrong with it; `place` names a line by its index.
    pub(crate) fn parse(
        id: &str,
        lines: impl IntoIterator<Item = (i64, u32, u64)>,
        place: impl Fn(usize) -> String,
    ) -> Result<Delivery, Vec<Violation>> {
        let mut fields = Fields::new();
        fields.check(
            is_key(id),
            "delivery_id",
            "must be 1 to 128 printable ASCII characters",
        );
        let mut sums: BTreeMap<(Sku, WarehouseId), u64> = BTreeMap::new();
        let mut lines = lines.into_iter().enumerate().peekable();
        fields.check(lines.peek().is_some(), "lines", "must not be empty");
        for (index, (warehouse, sku, count)) in lines {
            let at = place(index);
            let (place, good) = (WarehouseId::new(warehouse), Sku::new(sku));
            fields.check(
                place.is_some(),
                format!("{at}.warehouse_id"),
                "must be above 0 and below 9223372036854775807",
            );
            fields.check(good.is_some(), format!("{at}.sku"), "must not be 0");
            let fits = (1..=MAX_UNITS).contains(&count);
            fields.check(
                fits,
                format!("{at}.count"),
                format!("must be 1 to {MAX_UNITS}"),
            );
            if let (Some(place), Some(good), true) = (place, good, fits) {
                *sums.entry((good, place)).or_default() += count;
            }
        }
        fields.finish()?;
        Ok(Delivery {
            id: id.to_owned(),
            lines: sums,
        })
    }

    /// All that an import finds, at once; what has no unit is left out.
    pub(crate) fn imported(
        id: &str,
        lines: impl Iterator<Item = (Sku, WarehouseId, i64)>,
    ) -> Delivery {
        let lines = lines.filter_map(|(sku, warehouse, units)| {
            let units = u64::try_from(units).ok().filter(|units| *units > 0)?;
            Some(((sku, warehouse), units))
        });
        Delivery {
            id: id.to_owned(),
            lines: lines.collect(),
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// In the order in which stock rows are locked.
    pub(crate) fn lines(&self) -> impl ExactSizeIterator<Item = (Sku, WarehouseId, u64)> + '_ {
        self.lines
            .iter()
            .map(|(&(sku, warehouse), &count)| (sku, warehouse, count))
    }

    /// Of the summed lines: the same goods in another order of lines are the same delivery.
    pub(crate) fn content_hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for (sku, warehouse, count) in self.lines() {
            hash.update(sku.get().to_be_bytes());
            hash.update(warehouse.get().to_be_bytes());
            hash.update(count.to_be_bytes());
        }
        hash.finalize().into()
    }

    pub(crate) fn units(&self) -> u64 {
        self.lines.values().sum()
    }
}

/// 1 to 128 printable ASCII characters: what an idempotency key or a delivery id may be.
pub(crate) fn is_key(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|byte| (0x20..=0x7e).contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivery(lines: &[(i64, u32, u64)]) -> Result<Delivery, Vec<Violation>> {
        Delivery::parse("d1", lines.iter().copied(), |index| {
            format!("lines[{index}]")
        })
    }

    #[test]
    fn the_same_goods_are_the_same_delivery() {
        let one = delivery(&[(1, 7, 2), (2, 7, 1), (1, 7, 3)]).unwrap();
        let other = delivery(&[(2, 7, 1), (1, 7, 5)]).unwrap();
        assert_eq!(one.content_hash(), other.content_hash());
        assert_ne!(
            one.content_hash(),
            delivery(&[(2, 7, 1), (1, 7, 6)]).unwrap().content_hash()
        );
    }

    #[test]
    fn a_bad_line_is_named() {
        let wrong = delivery(&[(1, 7, 2), (0, 0, 0)]).unwrap_err();
        let wrong: Vec<_> = wrong.into_iter().map(|v| v.field).collect();
        assert_eq!(
            wrong,
            ["lines[1].warehouse_id", "lines[1].sku", "lines[1].count"]
        );
        assert!(Delivery::parse("", [(1, 1, 1)], |_| String::new()).is_err());
    }
}
