//! `moebius devices`: what can be computed on here, and why not on the rest.

use moebius::Engine;
use serde_json::json;

use crate::cli::DevicesArgs;
use crate::failure::Failure;

pub(crate) fn run(args: &DevicesArgs) -> Result<(), Failure> {
    let devices = Engine::devices();
    if args.json {
        let list: Vec<_> = devices
            .iter()
            .map(|d| match &d.state {
                Ok(what) => json!({ "name": d.name, "available": true, "description": what }),
                Err(why) => json!({ "name": d.name, "available": false, "reason": why }),
            })
            .collect();
        println!("{}", json!({ "devices": list }));
        return Ok(());
    }
    for device in devices {
        match device.state {
            Ok(what) => println!("{:<8} {what}", device.name),
            Err(why) => println!("{:<8} not available: {why}", device.name),
        }
    }
    Ok(())
}
