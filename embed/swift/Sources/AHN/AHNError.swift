import CAHN
import Foundation

/// What went wrong, and what to do about it in one sentence (``errorDescription``).
public struct AHNError: LocalizedError, Equatable, Sendable {
  /// What kind of thing went wrong.
  public enum Kind: Int32, Sendable {
    /// A number out of range, or a token that the model does not have.
    case badArgument = 2
    /// A file that is absent or cannot be read.
    case noFile = 3
    /// A file that is not what it should be, or was cut or changed.
    case damaged = 4
    /// A model that another version of MLX has exported.
    case otherMLX = 5
    /// A model that was exported for a device this machine lacks.
    case otherDevice = 6
    /// A memory of another model, tokenizer or window.
    case otherModel = 7
    /// No such directory, no permission, or a file that is no memory and stays as it is.
    case notWritten = 8
    /// The disk is full; nothing was written.
    case noSpace = 9
    case noMemory = 10
    /// The session is reading or answering.
    case busy = 11
    /// A text that is not UTF-8.
    case badText = 12
    /// There is nothing to answer.
    case empty = 13
    /// The chat template does not allow this.
    case template = 14
    /// The session was interrupted inside of a step; load or make another.
    case broken = 15
    case `internal` = 16
  }

  public let kind: Kind
  public let message: String

  public var errorDescription: String? { message }

  /// Throws what the C library said of a call that failed, or that the task was cancelled.
  static func check(_ status: ahn_status) throws {
    if status == AHN_OK { return }
    if status == AHN_STOPPED { throw CancellationError() }
    let kind = Kind(rawValue: Int32(bitPattern: UInt32(status.rawValue))) ?? .internal
    throw AHNError(kind: kind, message: String(cString: ahn_error()))
  }
}
