//! Which SKUs an order asks for: evenly, by a power law as in a shop, or with a bestseller in every order.

use std::{collections::BTreeSet, str::FromStr};

use proto::loms::OrderItem;
use rand::{Rng, rngs::StdRng};
use rand_distr::{Distribution as _, Zipf};

/// The first SKU; what a hot one is beside.
const FIRST: u32 = 10_001;
/// How many SKUs the cold lines of an order with a hot one are drawn from.
const COLD: u32 = 1_000;

/// A distribution of SKUs: `uniform:1000`, `zipf:0.99:1000`, `hot:1`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Skus {
    /// Every one of so many is as likely as any other.
    Uniform(u32),
    /// The n-th of so many is drawn in proportion to 1 / n to the exponent.
    Zipf(f64, u32),
    /// Every order has one of so many, and its other lines are drawn evenly from a thousand others.
    Hot(u32),
}

impl FromStr for Skus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is none of uniform:N, zipf:EXPONENT:N, hot:N");
        let number = |text: &str| {
            text.parse::<u32>()
                .ok()
                .filter(|n| (1..=1_000_000).contains(n))
                .ok_or_else(wrong)
        };
        match text.split(':').collect::<Vec<_>>()[..] {
            ["uniform", n] => Ok(Skus::Uniform(number(n)?)),
            ["hot", n] => Ok(Skus::Hot(number(n)?)),
            ["zipf", exponent, n] => {
                let exponent = exponent.parse().map_err(|_| wrong())?;
                if !(0.0..10.0).contains(&exponent) {
                    return Err(wrong());
                }
                Ok(Skus::Zipf(exponent, number(n)?))
            }
            _ => Err(wrong()),
        }
    }
}

impl std::fmt::Display for Skus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Skus::Uniform(n) => write!(f, "uniform:{n}"),
            Skus::Zipf(exponent, n) => write!(f, "zipf:{exponent}:{n}"),
            Skus::Hot(n) => write!(f, "hot:{n}"),
        }
    }
}

impl Skus {
    /// Every SKU that can be drawn.
    pub(super) fn all(&self) -> impl Iterator<Item = u32> {
        let (first, many) = self.range();
        first..first + many
    }

    /// The first of them, and how many there are.
    pub(super) fn range(&self) -> (u32, u32) {
        let many = match self {
            Skus::Uniform(n) | Skus::Zipf(_, n) => *n,
            Skus::Hot(n) => *n + COLD,
        };
        (FIRST, many)
    }

    /// One SKU.
    pub(super) fn one(&self, random: &mut StdRng) -> u32 {
        match self {
            Skus::Uniform(n) => FIRST + random.random_range(0..*n),
            Skus::Zipf(exponent, n) => match Zipf::new(f64::from(*n), *exponent) {
                // from 1 to n
                Ok(zipf) => FIRST + (zipf.sample(random) as u32).clamp(1, *n) - 1,
                Err(_) => FIRST,
            },
            Skus::Hot(n) => FIRST + n + random.random_range(0..COLD),
        }
    }

    /// An order of `lines` different SKUs, a unit each; fewer where there are not so many.
    pub(super) fn order(&self, lines: usize, random: &mut StdRng) -> Vec<OrderItem> {
        let lines = lines.min(self.all().count());
        let mut skus = BTreeSet::new();
        if let Skus::Hot(n) = self {
            skus.insert(FIRST + random.random_range(0..*n));
        }
        while skus.len() < lines {
            skus.insert(self.one(random));
        }
        skus.into_iter()
            .map(|sku| OrderItem { sku, count: 1 })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn every_distribution_reads_as_it_writes() {
        for text in ["uniform:1000", "zipf:0.99:1000", "hot:1"] {
            assert_eq!(text.parse::<Skus>().unwrap().to_string(), text);
        }
        for text in ["", "uniform", "uniform:0", "hot:x", "zipf:1", "zipf:-1:5"] {
            assert!(text.parse::<Skus>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_hot_sku_is_in_every_order_and_a_popular_one_in_many() {
        let mut random = StdRng::seed_from_u64(7);
        let hot = Skus::Hot(1);
        for _ in 0..100 {
            let order = hot.order(3, &mut random);
            assert_eq!((order.len(), order[0].sku), (3, FIRST));
        }
        let zipf = Skus::Zipf(0.99, 1000);
        let first = (0..10_000).filter(|_| zipf.one(&mut random) == FIRST);
        // 1 / H(1000, 0.99) is 13 %
        assert!((1_000..1_700).contains(&first.count()));
        for _ in 0..1_000 {
            let sku = zipf.one(&mut random);
            assert!(zipf.all().any(|known| known == sku), "{sku}");
        }
    }
}
