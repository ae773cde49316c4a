import Foundation

/// Calls of the C library wait for its thread, so they must not occupy one of Swift's.
enum Blocking {
  private static let queue = DispatchQueue(label: "ahn", attributes: .concurrent)

  static func run<T: Sendable>(_ work: @escaping @Sendable () throws -> T) async throws -> T {
    try await withCheckedThrowingContinuation { continuation in
      queue.async { continuation.resume(with: Result { try work() }) }
    }
  }
}

/// Says to a callback of C that it is to stop.
final class Stop: @unchecked Sendable {
  private let lock = NSLock()
  private var asked = false

  func ask() {
    lock.lock()
    asked = true
    lock.unlock()
  }

  var isAsked: Bool {
    lock.lock()
    defer { lock.unlock() }
    return asked
  }
}
