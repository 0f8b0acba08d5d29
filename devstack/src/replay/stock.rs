//! What is left on sale, as anyone can ask for it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::loms::StocksRequest;
use sha2::{Digest as _, Sha256};

use crate::{clients::Clients, retail::Folder};

/// Thousands of SKUs are asked for, this many at a time.
const AT_ONCE: usize = 16;

/// Units on sale by SKU, over all warehouses, 0 included.
pub(super) async fn left(folder: &Folder, clients: &Clients) -> Result<BTreeMap<u32, u64>> {
    let ask = |sku| {
        let mut loms = clients.loms.clone();
        async move {
            let stocks = loms
                .stocks(StocksRequest { sku })
                .await
                .context("Stocks")?
                .into_inner()
                .stocks;
            anyhow::Ok((sku, stocks.iter().map(|stock| stock.count).sum()))
        }
    };
    stream::iter(folder.skus())
        .map(ask)
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

/// SHA-256 of the lines `sku,left`, ascending, joined by a newline.
pub(super) fn digest(left: &BTreeMap<u32, u64>) -> String {
    let lines: Vec<_> = left
        .iter()
        .map(|(sku, left)| format!("{sku},{left}"))
        .collect();
    let digest = Sha256::digest(lines.join("\n"));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_newline_at_the_end() {
        // printf '1,0\n2,30' | sha256sum
        let expected = "81cc9868dfbc96650f6c50a394d611a0a5f94d16f222b19fcf883a5ddedf60b8";
        assert_eq!(digest(&BTreeMap::from([(2, 30), (1, 0)])), expected);
    }
}
