//! The cart as arithmetic: what a line may be, whether a line may grow, and what the cart costs. No I/O, no clock.

use std::fmt;

/// The most SKUs of a cart; LOMS takes no more in one order.
pub const MAX_SKUS: u64 = 1000;

/// A user of the shop: a positive number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UserId(i64);

impl UserId {
    /// `None` unless positive.
    pub fn new(id: i64) -> Option<Self> {
        (id > 0).then_some(Self(id))
    }

    /// The number itself.
    pub fn get(self) -> i64 {
        self.0
    }
}

/// A stock keeping unit: what is sold, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sku(u32);

impl Sku {
    /// `None` for 0.
    pub fn new(sku: u32) -> Option<Self> {
        (sku > 0).then_some(Self(sku))
    }

    /// The number itself.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Sku {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Units of one SKU in one cart or order: 1 to 65535.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(u16);

impl Quantity {
    /// The most units of one line.
    pub const MAX: u32 = u16::MAX as u32;

    /// `None` for 0 and for more than [`Quantity::MAX`].
    pub fn new(units: u32) -> Option<Self> {
        u16::try_from(units)
            .ok()
            .filter(|units| *units > 0)
            .map(Self)
    }

    /// The number of units.
    pub fn get(self) -> u32 {
        u32::from(self.0)
    }
}

/// One SKU of a cart or of a purchase, and how many units of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// What.
    pub sku: Sku,
    /// How many.
    pub quantity: Quantity,
}

/// What a cart holds, as far as adding units of one SKU depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// Units of the SKU in the cart.
    pub in_cart: u32,
    /// Units of the SKU in the user's open purchase: they come back if it fails.
    pub in_purchase: u32,
    /// Different SKUs in the cart and the open purchase together.
    pub skus: u64,
}

/// Why a cart does not take more units of a SKU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody has so many: the cart's units and those asked for are more than what is on sale.
    InsufficientStock,
    /// The cart, with what an open purchase may give back, would hold too many SKUs or units.
    CartFull,
}

impl Holding {
    /// How many units the cart's line has after `asked` more, with `on_sale` units on sale now.
    ///
    /// The units of an open purchase count for the limits only: they may be reserved already, so the stock read does not
    /// hold them any more, but when the purchase fails they are merged into the cart, which must never be impossible.
    pub fn add(self, asked: Quantity, on_sale: u64) -> Result<Quantity, Refusal> {
        let line = u64::from(self.in_cart) + u64::from(asked.get());
        if on_sale < line {
            return Err(Refusal::InsufficientStock);
        }
        let is_new = self.in_cart == 0 && self.in_purchase == 0;
        if is_new && self.skus >= MAX_SKUS {
            return Err(Refusal::CartFull);
        }
        if line + u64::from(self.in_purchase) > u64::from(Quantity::MAX) {
            return Err(Refusal::CartFull);
        }
        u32::try_from(line)
            .ok()
            .and_then(Quantity::new)
            .ok_or(Refusal::CartFull)
    }
}

impl Quantity {
    /// What is left after taking `taken` units out; `None` when the line goes away.
    pub fn take(self, taken: Quantity) -> Option<Quantity> {
        Quantity::new(self.get().saturating_sub(taken.get()))
    }
}

/// The sum of units times price; `None` when it does not fit the contract's uint32.
pub fn total(lines: impl IntoIterator<Item = (Quantity, u32)>) -> Option<u32> {
    lines.into_iter().try_fold(0u32, |sum, (quantity, price)| {
        quantity
            .get()
            .checked_mul(price)
            .and_then(|cost| sum.checked_add(cost))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn quantity(units: u32) -> Quantity {
        Quantity::new(units).unwrap()
    }

    const EMPTY: Holding = Holding {
        in_cart: 0,
        in_purchase: 0,
        skus: 0,
    };

    #[test]
    fn newtypes_refuse_what_the_contract_refuses() {
        assert!(UserId::new(0).is_none() && UserId::new(-1).is_none() && UserId::new(1).is_some());
        assert!(Sku::new(0).is_none() && Sku::new(u32::MAX).is_some());
        assert!(Quantity::new(0).is_none() && Quantity::new(65_536).is_none());
        assert_eq!(quantity(65_535).get(), 65_535);
    }

    #[test]
    fn stock_counts_the_units_already_in_the_cart() {
        let holding = Holding {
            in_cart: 3,
            skus: 1,
            ..EMPTY
        };
        assert_eq!(holding.add(quantity(2), 5), Ok(quantity(5)));
        assert_eq!(holding.add(quantity(3), 5), Err(Refusal::InsufficientStock));
        assert_eq!(EMPTY.add(quantity(1), 0), Err(Refusal::InsufficientStock));
    }

    #[test]
    fn a_full_cart_takes_known_skus_only() {
        let full = Holding {
            skus: MAX_SKUS,
            ..EMPTY
        };
        assert_eq!(full.add(quantity(1), 9), Err(Refusal::CartFull));
        assert!(Holding { in_cart: 1, ..full }.add(quantity(1), 9).is_ok());
        assert!(
            Holding {
                in_purchase: 1,
                ..full
            }
            .add(quantity(1), 9)
            .is_ok()
        );
        assert!(
            Holding {
                skus: MAX_SKUS - 1,
                ..EMPTY
            }
            .add(quantity(1), 9)
            .is_ok()
        );
    }

    #[test]
    fn units_of_an_open_purchase_count_for_the_limit() {
        let holding = Holding {
            in_cart: 0,
            in_purchase: 65_000,
            skus: 1,
        };
        assert_eq!(holding.add(quantity(535), u64::MAX), Ok(quantity(535)));
        assert_eq!(holding.add(quantity(536), u64::MAX), Err(Refusal::CartFull));
    }

    #[test]
    fn taking_more_than_there_is_removes_the_line() {
        assert_eq!(quantity(5).take(quantity(2)), Some(quantity(3)));
        assert_eq!(quantity(5).take(quantity(5)), None);
        assert_eq!(quantity(5).take(quantity(6)), None);
    }

    #[test]
    fn a_total_that_does_not_fit_is_none() {
        assert_eq!(total([]), Some(0));
        assert_eq!(total([(quantity(1), u32::MAX)]), Some(u32::MAX));
        assert_eq!(total([(quantity(1), u32::MAX), (quantity(1), 1)]), None);
        assert_eq!(total([(quantity(65_535), 65_538)]), None);
    }

    proptest! {
        #[test]
        fn adding_never_passes_stock_or_limits(
            in_cart in 0u32..=65_535, in_purchase in 0u32..=65_535, skus in 0u64..=1_200,
            asked in 1u32..=65_535, on_sale in 0u64..200_000,
        ) {
            let holding = Holding { in_cart, in_purchase, skus };
            let fits = in_cart + asked + in_purchase <= 65_535;
            let sold_somewhere = u64::from(in_cart + asked) <= on_sale;
            let has_place = in_cart > 0 || in_purchase > 0 || skus < 1_000;
            match holding.add(quantity(asked), on_sale) {
                Ok(line) => {
                    prop_assert_eq!(line.get(), in_cart + asked);
                    prop_assert!(fits && sold_somewhere && has_place);
                }
                Err(Refusal::InsufficientStock) => prop_assert!(!sold_somewhere),
                Err(Refusal::CartFull) => prop_assert!(!fits || !has_place),
            }
        }

        #[test]
        fn a_total_is_exact_or_absent(lines in prop::collection::vec((1u32..=65_535, any::<u32>()), 0..20)) {
            let exact: u128 = lines.iter().map(|(n, price)| u128::from(*n) * u128::from(*price)).sum();
            let got = total(lines.iter().map(|(n, price)| (quantity(*n), *price)));
            prop_assert_eq!(got, u32::try_from(exact).ok());
        }
    }
}
