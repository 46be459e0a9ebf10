// SPDX-License-Identifier: GPL-2.0-only
//! A private network of guests: each has a card, `eth1`, and nobody else is in it.
//!
//! The wire is a multicast group on the host's loopback interface, so there is no process in the middle that
//! could die, guests come and go as they like, and nothing needs privileges on the host. A datagram that
//! finds a buffer full is lost, as on any network.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Network {
    group: Ipv4Addr,
    port: u16,
    members: Vec<String>,
}

/// A guest's place in a network.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Seat {
    network: Network,
    index: usize,
}

impl Network {
    /// A network of its own for guests of these host names, fewer than 250.
    pub fn new(members: &[String]) -> Result<Self> {
        let socket = UdpSocket::bind("127.0.0.1:0").context("no free port on this machine")?;
        let port = socket.local_addr()?.port();
        let [.., high, low] = std::process::id().to_be_bytes();
        Ok(Network {
            // The block for sites' own use (RFC 2365). Two runs that get one port differ in this.
            group: Ipv4Addr::new(239, 255, high, low),
            port,
            members: members.to_vec(),
        })
    }

    /// The host names.
    pub fn members(&self) -> &[String] {
        &self.members
    }

    /// The place of each guest.
    pub fn seats(&self) -> impl Iterator<Item = Seat> + '_ {
        (0..self.members.len()).map(|index| Seat {
            network: self.clone(),
            index,
        })
    }

    /// The address of guest `index`.
    pub fn address(&self, index: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, index as u8 + 1)
    }
}

impl Seat {
    /// The network.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Which guest this is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Its host name.
    pub fn name(&self) -> &str {
        &self.network.members[self.index]
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.network.address(self.index)
    }

    /// The hardware address of its card.
    pub fn mac(&self) -> String {
        mac(self.index + 1)
    }

    /// QEMU's end of the wire.
    pub fn netdev(&self, id: &str) -> String {
        let Network { group, port, .. } = &self.network;
        format!("socket,id={id},mcast={group}:{port},localaddr=127.0.0.1")
    }
}

/// A hardware address out of the block that QEMU uses.
pub fn mac(number: usize) -> String {
    format!("52:54:00:7a:75:{number:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_guests_share_a_name_or_an_address() {
        let network = Network::new(&["a".into(), "b".into(), "c".into()]).unwrap();
        let seats: Vec<Seat> = network.seats().collect();
        let names: Vec<&str> = seats.iter().map(Seat::name).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let macs: Vec<String> = seats.iter().map(Seat::mac).collect();
        assert_eq!(macs[0], "52:54:00:7a:75:01");
        assert!(macs[0] != macs[1] && macs[1] != macs[2]);
        assert_eq!(seats[2].address(), Ipv4Addr::new(10, 77, 0, 3));
        // One wire.
        assert_eq!(seats[0].netdev("n"), seats[2].netdev("n"));
    }
}
