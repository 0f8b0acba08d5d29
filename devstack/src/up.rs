//! The stack on the contract's ports, for people: it stays until Ctrl-C and prints lines to try, which work as printed and
//! in their order, because the databases are fresh and the first order is number 1.

use std::{
    net::{Ipv4Addr, TcpListener},
    path::Path,
};

use anyhow::Result;
use time::OffsetDateTime;

use crate::{
    binaries::{Binaries, SERVICES},
    certs,
    failure::{Interrupted, Misuse, after_cleanup},
    ports::Ports,
    signals::Stop,
    stack::{Options, Stack},
};

/// Where `make certs` puts them.
const CERTS: &str = "certs";

/// Starts the stack with the retail stock and stays.
pub async fn run(binaries: Binaries) -> Result<()> {
    check_ports()?;
    if certs::ensure(Path::new(CERTS), certs::Layout::Together, false)? == certs::Outcome::Written {
        println!("wrote development certificates to {CERTS}/");
    }
    let mut stop = Stop::listen()?;
    let options = Options {
        ports: Ports::Contract,
        certs: Some(CERTS.into()),
        ..Options::new(binaries)
    };
    println!("starting");
    let mut stack = stop.interrupts(Stack::start(&options)).await?;
    let outcome = stop.interrupts(stay(&mut stack)).await;
    println!("\nstopping");
    let stopped = stop.impatient(stack.stop()).await;
    match outcome {
        // Ctrl-C is how this command is meant to end
        Err(error) if error.is::<Interrupted>() => stopped,
        outcome => after_cleanup(outcome, stopped),
    }
}

async fn stay(stack: &mut Stack) -> Result<()> {
    println!("  {}", stack.receive_retail_stock().await?);
    // a history that is asked for at once must not be empty
    stack.wait_for_consumer().await?;
    print_addresses(stack)?;
    print_lines();
    match stack.watch().await? {}
}

/// Before anything is started, because a taken port is the likeliest thing to be wrong.
fn check_ports() -> Result<()> {
    for name in SERVICES.into_iter().chain(["products"]) {
        let (grpc, http) = Ports::Contract.of(name);
        for port in [grpc, http].into_iter().filter(|port| *port != 0) {
            if let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                let what = format!("port {port}, which {name} needs: {error}");
                return Err(Misuse::error(
                    what,
                    "stop what uses it (another `make up`, compose?)",
                ));
            }
        }
    }
    Ok(())
}

fn print_addresses(stack: &Stack) -> Result<()> {
    println!();
    for name in SERVICES {
        let service = stack.service(name)?;
        println!(
            "{name:<14} gRPC {}   HTTP http://{}",
            service.grpc(),
            service.http()
        );
    }
    let (postgres, brokers) = stack.backing();
    println!(
        "{:<14} gRPC {}   10 requests a second, 5 at once",
        "products",
        stack.products()
    );
    println!("{:<14} {postgres}", "PostgreSQL");
    println!("{:<14} {}", "Kafka", brokers.join(","));
    println!(
        "{:<14} {}   configurations and logs",
        "files",
        stack.dir().display()
    );
    Ok(())
}

fn print_lines() {
    let year = OffsetDateTime::now_utc().year().to_string();
    println!("\nTry, in this order (each HTTP address has /metrics, /healthz and /readyz too):\n");
    print!("{}", LINES.replace("YEAR", &year));
    println!("\nCtrl-C stops everything.");
}

/// Orders 1 and 2 over gRPC, 3 and 4 over HTTP; all SKUs are in stock.
const LINES: &str = r#"grpcurl -cacert certs/ca.pem localhost:50051 list
grpcurl -cacert certs/ca.pem -d '{"sku":85123001}' localhost:50052 loms.Loms/Stocks
grpcurl -cacert certs/ca.pem -d '{"user":1,"sku":85123001,"count":6}' localhost:50051 cart.Cart/AddToCart
grpcurl -cacert certs/ca.pem -d '{"user":1,"sku":71053000,"count":4}' localhost:50051 cart.Cart/AddToCart
grpcurl -cacert certs/ca.pem -d '{"user":1,"sku":71053000,"count":1}' localhost:50051 cart.Cart/DeleteFromCart
grpcurl -cacert certs/ca.pem -d '{"user":1}' localhost:50051 cart.Cart/ListCart
grpcurl -cacert certs/ca.pem -d '{"user":1}' localhost:50051 cart.Cart/Purchase
grpcurl -cacert certs/ca.pem -d '{"orderID":1}' localhost:50052 loms.Loms/ListOrder
grpcurl -cacert certs/ca.pem -d '{"orderID":1}' localhost:50052 loms.Loms/OrderPayed
grpcurl -cacert certs/ca.pem -d '{"user":1,"items":[{"sku":22752000,"count":2}]}' localhost:50052 loms.Loms/CreateOrder
grpcurl -cacert certs/ca.pem -d '{"orderID":2}' localhost:50052 loms.Loms/CancelOrder
grpcurl -cacert certs/ca.pem -cert certs/operator.pem -key certs/operator-key.pem -d '{"delivery_id":"by-hand","lines":[{"warehouse_id":1,"sku":22752000,"count":10}]}' localhost:50052 loms.Loms/ReceiveStock
grpcurl -cacert certs/ca.pem -d '{"user":1,"from":{"year":YEAR,"month":1,"day":1},"to":{"year":YEAR,"month":12,"day":31}}' localhost:50053 notifications.Notifications/GetHistoryWithPeriod
grpcurl -cacert certs/ca.pem -d '{"token":"testtoken","sku":85123001}' localhost:50054 route256.product.ProductService/GetProduct

curl -sSw '\n' -d '{"sku":84029005}' http://localhost:8081/stocks
curl -sSw '\n' -d '{"user":2,"sku":84029005,"count":3}' http://localhost:8090/addToCart
curl -sSw '\n' -d '{"user":2,"sku":84029005,"count":1}' http://localhost:8090/deleteFromCart
curl -sSw '\n' -d '{"user":2}' http://localhost:8090/listCart
curl -sSw '\n' -d '{"user":2}' http://localhost:8090/listCartRequest
curl -sSw '\n' -d '{"user":2}' http://localhost:8090/purchase
curl -sSw '\n' -d '{"orderID":3}' http://localhost:8081/listOrder
curl -sSw '\n' -d '{"orderID":3}' http://localhost:8081/orderPayed
curl -sSw '\n' -d '{"user":2,"items":[{"sku":22752000,"count":1}]}' http://localhost:8081/createOrder
curl -sSw '\n' -d '{"orderID":4}' http://localhost:8081/cancelOrder
curl -sSw '\n' -d '{"user":1,"from":{"year":YEAR,"month":1,"day":1},"to":{"year":YEAR,"month":12,"day":31}}' http://localhost:8082/history
"#;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_body_is_json() {
        let lines = LINES.replace("YEAR", "2026");
        let bodies: Vec<_> = lines
            .lines()
            .filter_map(|line| line.split(" -d '").nth(1)?.split('\'').next())
            .collect();
        assert_eq!(bodies.len(), 24);
        for body in bodies {
            serde_json::from_str::<serde_json::Value>(body)
                .unwrap_or_else(|error| panic!("{body}: {error}"));
        }
    }
}
