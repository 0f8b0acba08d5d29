//! ListCart. Names and prices come from ProductService ten times a second at most, so what is measured is a shop whose
//! prices are cached; how long the first callers waited is in the report.

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use futures::future::try_join_all;
use proto::cart::{AddToCartRequest, ListCartRequest, cart_client::CartClient};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use tokio::time::Instant;
use tonic::transport::Channel;

use super::{
    Plan,
    calls::code,
    measure::{self, Caller, Figures},
    target::Target,
};
use crate::retail;

const CARTS: i64 = 200;
/// SKUs in them: as many as ProductService prices in five seconds.
const SKUS: usize = 50;
/// Carts filled at once.
const FILLERS: i64 = 16;
/// For a call of the preparation, whose prices are not there yet.
const PATIENCE: Duration = Duration::from_secs(30);

/// Fills carts of `plan.lines` lines, has every price looked up once, then lists.
pub(super) async fn list(
    plan: &Plan,
    target: &Target,
    measured: &mut Vec<(String, f64)>,
) -> Result<Figures> {
    let skus = retail::catalogue(retail::PRODUCTS_CSV)?.into_keys();
    let skus: Vec<u32> = skus.take(SKUS.max(plan.lines)).collect();
    if let Some(stack) = target.stack() {
        let lines = skus.iter().map(|sku| format!("1,{sku},1000000\n"));
        let file = stack.dir().join("load.csv");
        let csv = format!("warehouse_id,sku,count\n{}", lines.collect::<String>());
        std::fs::write(&file, csv).context("write the delivery")?;
        stack.receive_stock(&file).await?;
    }
    let channel = target.channel();
    let clients = move |caller| CartClient::new(channel(caller));
    fill(plan.lines, &skus, clients.clone()).await?;
    let began = Instant::now();
    try_join_all((1..=CARTS).map(|user| priced(clients(user as usize), user))).await?;
    measured.push(("all_priced_s".into(), began.elapsed().as_secs_f64()));
    let call = move |mut caller: Caller| {
        let mut client = clients(caller.index);
        async move {
            let user = caller.random.random_range(1..=CARTS);
            let answer = match client.list_cart(ListCartRequest { user }).await {
                Ok(_) => "OK".to_owned(),
                Err(status) => code(&status),
            };
            (caller, Some(answer))
        }
    };
    measure::run(plan.pace(), plan.span(), 1, call).await
}

async fn fill(
    lines: usize,
    skus: &[u32],
    clients: impl Fn(usize) -> CartClient<Channel>,
) -> Result<()> {
    let skus = Arc::new(skus.to_vec());
    try_join_all((0..FILLERS).map(|filler| {
        let (mut client, skus) = (clients(filler as usize), skus.clone());
        let mut random = StdRng::seed_from_u64(filler as u64);
        async move {
            for user in (1..=CARTS).filter(|user| user % FILLERS == filler) {
                for sku in skus.choose_multiple(&mut random, lines) {
                    let request = AddToCartRequest {
                        user,
                        sku: *sku,
                        count: 1,
                    };
                    client.add_to_cart(request).await.context("fill a cart")?;
                }
            }
            anyhow::Ok(())
        }
    }))
    .await?;
    Ok(())
}

/// Lists until the prices are there: the first callers of all wait for their turn at ProductService.
async fn priced(mut client: CartClient<Channel>, user: i64) -> Result<()> {
    let by = Instant::now() + PATIENCE;
    loop {
        match client.list_cart(ListCartRequest { user }).await {
            Ok(_) => return Ok(()),
            Err(refused) if Instant::now() > by => return Err(refused).context("list a cart"),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}
