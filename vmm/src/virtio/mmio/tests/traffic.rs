//! A driver that does anything, in any order.

use proptest::prelude::*;

use super::*;

/// What a guest can do to a slot.
#[derive(Debug, Clone)]
enum Touch {
    Read { offset: u64, width: usize },
    Write { offset: u64, width: usize, value: u64 },
    Start(QueueSetup),
    Publish(u16),
    Kick,
}

fn touch() -> impl Strategy<Value = Touch> {
    let any_offset = prop_oneof![0..0x120_u64, Just(0xffc_u64), (0..0x48_u64).prop_map(|n| n * 4)];
    let register = prop_oneof![
        Just(STATUS),
        Just(QUEUE_SEL),
        Just(QUEUE_SIZE),
        Just(QUEUE_READY),
        Just(DRIVER_FEATURES),
        Just(DRIVER_FEATURES_SEL),
        Just(INTERRUPT_ACK),
        Just(QUEUE_DESC_LOW),
        Just(QUEUE_DRIVER_HIGH),
    ];
    let width = prop_oneof![4 => Just(4_usize), 1 => Just(1), 1 => Just(2), 1 => Just(8)];
    let value = prop_oneof![
        Just(0_u64),
        Just(1),
        Just(3),
        Just(0xb),
        Just(0xf),
        Just(0x80),
        Just(64),
        Just(u64::MAX),
        any::<u64>()
    ];
    let address = prop_oneof![(0..64_u64).prop_map(|n| n * 4096), any::<u64>()];
    let setup =
        (prop_oneof![Just(64_u16), any::<u16>()], address.clone(), address.clone(), address)
            .prop_map(|(size, descriptors, driver, device)| QueueSetup {
                size,
                ready: true,
                descriptors,
                driver,
                device,
            });
    prop_oneof![
        3 => (any_offset.clone(), width.clone())
            .prop_map(|(offset, width)| Touch::Read { offset, width }),
        3 => (any_offset, width.clone(), any::<u64>())
            .prop_map(|(offset, width, value)| Touch::Write { offset, width, value }),
        6 => (register, width, value)
            .prop_map(|(offset, width, value)| Touch::Write { offset, width, value }),
        2 => setup.prop_map(Touch::Start),
        2 => any::<u16>().prop_map(Touch::Publish),
        2 => Just(Touch::Kick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a driver did, the next one can start over.
    #[test]
    fn any_traffic_leaves_a_device_that_can_be_reset(
        touches in prop::collection::vec(touch(), 1..60),
    ) {
        let guest = Guest::new();
        let driver = Driver::of_entropy(&guest);
        let mut queue = QueueFixture::new(&guest, 0, QUEUE_SIZE_MAX_OF_ENTROPY);
        let slot = mmio_slot(0).unwrap();
        for touch in touches {
            match touch {
                Touch::Read { offset, width } => {
                    driver.slots.read(slot + offset, &mut vec![0; width]);
                }
                Touch::Write { offset, width, value } => {
                    driver.slots.write(slot + offset, &value.to_le_bytes()[..width]);
                }
                Touch::Start(setup) => {
                    let status = driver.start(&setup);
                    prop_assert_eq!(status & !NEEDS_RESET, RUNNING);
                }
                Touch::Publish(head) => queue.publish(head),
                Touch::Kick => driver.kick(),
            }
        }
        for offset in (0..CONFIG).step_by(4) {
            driver.read(offset);
        }
        driver.write(STATUS, 0);
        driver.settle();
        driver.gives_random_bytes(&guest);
    }
}
