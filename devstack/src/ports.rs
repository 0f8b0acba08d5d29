//! Where things listen: on the contract's ports, or wherever there is room. A free port stays ours as long as the run, so
//! that what is killed comes back where its neighbours look for it.

use std::net::{Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result};
use tokio::net::TcpSocket;

/// Where everything listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ports {
    /// Wherever there is room: any number of stacks at once.
    Free,
    /// The contract's ports, for people.
    Contract,
}

impl Ports {
    /// The gRPC and HTTP port of a service, by the contract, 0 for any.
    pub fn of(self, service: &str) -> (u16, u16) {
        match (self, service) {
            (Ports::Contract, "checkout") => (50051, 8090),
            (Ports::Contract, "loms") => (50052, 8081),
            (Ports::Contract, "notifications") => (50053, 8082),
            (Ports::Contract, "products") => (50054, 0),
            _ => (0, 0),
        }
    }
}

/// A loopback address that nobody else is given while this is held. The socket is bound and never listens: Linux lets a
/// server that sets SO_REUSEADDR, as all of ours do, listen there, and gives the port to no other socket.
pub struct Reserved {
    address: SocketAddr,
    #[expect(dead_code, reason = "held for its drop")]
    socket: TcpSocket,
}

impl Reserved {
    /// Any free port.
    pub fn any() -> Result<Reserved> {
        let reserve = || {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
            let address = socket.local_addr()?;
            std::io::Result::Ok(Reserved { address, socket })
        };
        reserve().context("reserve a port")
    }

    /// Where to listen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_server_comes_and_goes_on_a_reserved_port() {
        let reserved = Reserved::any().unwrap();
        for _ in 0..2 {
            assert!(TcpStream::connect(reserved.address()).await.is_err());
            let listener = TcpListener::bind(reserved.address()).await.unwrap();
            assert!(TcpStream::connect(reserved.address()).await.is_ok());
            drop(listener);
        }
    }
}
