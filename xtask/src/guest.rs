// SPDX-License-Identifier: GPL-2.0-only
//! From what a guest shall be to its image: kernel, packages and disk are built
//! or found in the cache on the way.

use anyhow::Result;

use crate::deb;
use crate::image::{self, Content, Distro};
use crate::kernel::{self, Driver};
use crate::packages;

/// What a guest contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Image {
    /// Our kernel without the driver, none of our packages.
    Bare,
    /// Our kernel and our packages.
    Ddsnap,
    /// Debian's kernel; our packages in /srv/debs.
    Stock,
    /// Debian's kernel and our packages, the module built by DKMS.
    StockInstalled,
}

/// A guest asked for.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Debian release.
    pub distro: Distro,
    /// Content.
    pub image: Image,
    /// Kernel configuration; Debian's kernel has none.
    pub kernel: String,
}

/// The image of a guest.
pub fn image(wanted: &Wanted) -> Result<image::Image> {
    // All at once: better asked for now than after a quarter of an hour's build.
    packages::require(&[kernel::PACKAGES, deb::PACKAGES, image::PACKAGES].concat())?;
    let content = match wanted.image {
        Image::Bare => Content::Own {
            kernel: kernel::build(&wanted.kernel, Driver::Without)?.image,
            debs: Vec::new(),
        },
        Image::Ddsnap => {
            let kernel = kernel::build(&wanted.kernel, Driver::With)?.image;
            // The module comes with the kernel; DKMS would only build it again.
            let debs = deb::build()?
                .into_iter()
                .filter(|deb| !deb::is_dkms(deb))
                .collect();
            Content::Own { kernel, debs }
        }
        Image::Stock | Image::StockInstalled => Content::Stock {
            debs: deb::build()?,
            installed: wanted.image == Image::StockInstalled,
        },
    };
    image::build(wanted.distro, &content)
}
